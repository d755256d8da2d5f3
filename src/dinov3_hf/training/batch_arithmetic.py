"""How a global batch is divided over ranks and accumulated micro-batches.

    global_batch_size = micro_batch_size x ranks x accumulation_steps

The global batch belongs to the recipe: schedules, learning-rate scaling, masks, KoLeo groups, stochastic depth and
RoPE augmentation are functions of it. The two other factors belong to the machine and change speed and memory only.
"""


def micro_batch_size(global_batch_size: int, num_ranks: int, wanted: int | None) -> int:
    """Images of one forward pass on one rank.

    Args:
        global_batch_size: images of one optimizer step.
        num_ranks: processes that share the work.
        wanted: what the user asked for; `None` takes the whole share of a rank (no accumulation).

    Raises:
        ValueError: the batch does not divide; the message names the nearest sizes that do.
    """
    if global_batch_size < num_ranks:
        raise ValueError(
            f"global_batch_size {global_batch_size} is smaller than the number of ranks {num_ranks}; use at least "
            f"{num_ranks}, or start fewer processes."
        )
    if global_batch_size % num_ranks:
        below = global_batch_size // num_ranks * num_ranks
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of the number of ranks {num_ranks}; use {below} "
            f"or {below + num_ranks}."
        )
    share = global_batch_size // num_ranks
    if wanted is None:
        return share
    if wanted < 1 or share % wanted:
        raise ValueError(
            f"per_device_train_batch_size {wanted} does not divide the {share} images that each rank has of "
            f"global_batch_size {global_batch_size}; use {_nearest_divisors(share, wanted)}."
        )
    return wanted


def check_koleo_groups(group_size: int | None, topk: int, batch_size: int, accumulation_steps: int) -> None:
    """Refuses KoLeo groups that do not tile the images of one forward pass over all ranks.

    Args:
        group_size: images among which nearest neighbours are sought; `None` is the whole global batch.
        topk: neighbours of each image.
        batch_size: images of one forward pass, micro-batch size times ranks.
        accumulation_steps: forward passes of one optimizer step.

    Raises:
        ValueError: the group does not divide the batch, spans several forward passes, or is too small for `topk`
            neighbours.
    """
    if group_size is None and accumulation_steps > 1:
        raise ValueError(
            f"koleo_group_size null is the whole global batch, but one forward pass sees {batch_size} of its "
            f"{batch_size * accumulation_steps} images; set koleo_group_size to {batch_size} or a divisor of it."
        )
    if group_size is not None and (group_size < 1 or batch_size % group_size):
        raise ValueError(
            f"koleo_group_size {group_size} does not divide the {batch_size} images of one forward pass over all "
            f"ranks; use {_nearest_divisors(batch_size, group_size)}."
        )
    num_images = batch_size if group_size is None else group_size
    if not 1 <= topk < max(num_images, 2):
        raise ValueError(
            f"koleo_topk {topk} needs groups of more than {topk} images, but they have {num_images}; use a koleo_topk "
            f"from 1 to {max(num_images - 1, 1)}."
        )


def check_part(name: str, size: int, micro_batch: int, koleo_group_size: int | None) -> None:
    """Refuses a part of a rank's micro-batch, for one forward pass at a high resolution, that would change the result.

    Args:
        name: of the field that holds `size`.
        size: images of the part.
        micro_batch: images of a forward pass on one rank elsewhere in the run.
        koleo_group_size: images among which nearest neighbours are sought; `None` is the whole global batch.

    Raises:
        ValueError: the parts do not tile the micro-batch, or tear groups of images.
    """
    if size < 1 or micro_batch % size:
        raise ValueError(
            f"{name} {size} does not divide the {micro_batch} images of a rank's micro-batch "
            f"(per_device_train_batch_size); use {_nearest_divisors(micro_batch, size)}."
        )
    if size < micro_batch and (koleo_group_size is None or size % koleo_group_size):
        groups = "the whole global batch" if koleo_group_size is None else f"groups of {koleo_group_size} images"
        raise ValueError(
            f"{name} {size} tears what KoLeo looks at together, {groups}; set koleo_group_size to {size} or a divisor "
            f"of it, or {name} to a multiple of the group."
        )


def check_gram_groups(group_size: int | None, micro_batch: int, global_batch_size: int) -> None:
    """Refuses groups of L_Gram that do not tile the images of one forward pass on one rank.

    Args:
        group_size: images whose patches are compared together; `None` compares within a crop only.
        micro_batch: images of one forward pass on one rank.
        global_batch_size: images of one optimizer step.

    Raises:
        ValueError: the groups do not divide the micro-batch.
    """
    if group_size is not None and (group_size < 1 or micro_batch % group_size):
        whole = " (null is the whole global batch)" if group_size == global_batch_size else ""
        raise ValueError(
            f"gram_group_size {group_size}{whole} does not divide the {micro_batch} images of one forward pass on one "
            f"rank; use {_nearest_divisors(micro_batch, group_size)}."
        )


def check_drop_path_groups(group_size: int, images: int, where: str = "per_device_train_batch_size") -> None:
    """Refuses groups of stochastic depth that do not tile the images of one forward pass on one rank.

    Args:
        group_size: images of which an exact subset goes through a branch.
        images: of one forward pass on one rank.
        where: name of the field that says so.

    Raises:
        ValueError: the groups do not divide the images.
    """
    if group_size < 1 or images % group_size:
        raise ValueError(
            f"drop_path_group_size {group_size} does not divide the {images} images of one forward pass on one rank "
            f"({where}); use {_nearest_divisors(images, group_size)}."
        )


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted`, as `8 or 16`."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < wanted]
    above = [divisor for divisor in divisors if divisor > wanted]
    return " or ".join(str(divisor) for divisor in (below[-1:] + above[:1]))
