"""Features are those of the model, of every family, however the images are fed; bad input gets a clear line."""

import io
import json
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torchvision.transforms import v2

from dinov3_hf.evals.features import (
    Features,
    ImageList,
    center_crop,
    check_divisible,
    extract_features,
    input_size,
    load_model,
    patch_grid,
)
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from tests.testing_utils import save_tiny_vit


def pictures(count=5, size=(40, 48), seed=0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8))


def tiny_stock_model(family: str) -> transformers.PreTrainedModel:
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    if family == "dinov3_vit":
        config = transformers.DINOv3ViTConfig(**vit, intermediate_size=32, num_register_tokens=3)
        return transformers.DINOv3ViTModel(config)
    if family == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**vit))
    if family == "dinov3_convnext":
        config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
        return transformers.DINOv3ConvNextModel(config)
    return transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


@pytest.mark.parametrize("family", ["dinov3_vit", "dinov2", "dinov3_convnext", "resnet"])
def test_models_saved_by_transformers(family, tmp_path):
    stock = tiny_stock_model(family).eval()
    stock.save_pretrained(tmp_path)
    build_image_processor(image_size=32).save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path))
    ours = {"dinov3_vit": DINOv3ViTModel, "dinov3_convnext": DINOv3ConvNextModel}
    assert isinstance(model, ours.get(family, type(stock)))
    features = extract_features(model, ImageList(pictures()), processor, labels=[0, 1, 0, 1, 1])
    with torch.no_grad():
        expected = stock(**processor(pictures(), return_tensors="pt")).pooler_output.flatten(1)
    torch.testing.assert_close(features.cls, expected, rtol=1e-5, atol=1e-5)
    assert features.labels.tolist() == [0, 1, 0, 1, 1]
    assert features.patches is None


def test_patches_leave_out_registers_and_keep_their_places(tmp_path):
    model = save_tiny_vit(tmp_path)
    loaded, processor = load_model(str(tmp_path))
    features = extract_features(loaded, ImageList(pictures()), processor, size=(24, 40), with_patches=True)
    pixels = processor(pictures(), size={"height": 24, "width": 40}, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state  # CLS, 2 registers, 3 x 5 patches
    assert features.grid == (3, 5)
    torch.testing.assert_close(features.cls, expected[:, 0])
    torch.testing.assert_close(features.patches, expected[:, 3:])
    torch.testing.assert_close(features.patch_maps()[:, 1, 2], expected[:, 3 + 1 * 5 + 2])
    with pytest.raises(ValueError, match="no patches; ask extract_features for them"):
        Features(features.cls).patch_maps()


def test_grey_models(tmp_path):
    save_tiny_vit(tmp_path, num_channels=1)
    model, processor = load_model(str(tmp_path))
    grey = [picture[..., :1] for picture in pictures()]
    from_arrays = extract_features(model, ImageList(grey), processor).cls
    from_pil = extract_features(
        model, ImageList([Image.fromarray(picture[..., 0]) for picture in grey]), processor
    ).cls
    torch.testing.assert_close(from_arrays, from_pil, rtol=0, atol=0)
    assert from_arrays.std(dim=0).max() > 0
    # An image one pixel high could be taken for one with its channels first.
    assert extract_features(model, ImageList([np.zeros((1, 8, 1), np.uint8)]), processor).cls.shape == (1, 24)


def test_models_of_several_channels(tmp_path):
    save_tiny_vit(tmp_path, num_channels=5)
    model, processor = load_model(str(tmp_path))
    several = list(np.random.default_rng(0).integers(0, 256, (3, 40, 48, 5), dtype=np.uint8))
    features = extract_features(model, ImageList(several), processor, with_patches=True)
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in several])
    resized = v2.functional.resize(pixels / 255, [32, 32], antialias=True)
    with torch.no_grad():
        expected = model(pixel_values=(resized - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=0, atol=0.02)  # resized as 8 bits, there as floats
    assert features.patches.shape == (3, 16, 24)
    for channel in range(5):
        alone = np.asarray(center_crop(several[0][..., channel : channel + 1], 32))
        np.testing.assert_array_equal(center_crop(several[0], 32)[..., channel], alone)
    wide = np.asarray(center_crop(Image.fromarray(several[0][..., :3]), 32))  # what PIL does with all at once
    np.testing.assert_array_equal(center_crop(several[0], 32)[..., :3], wide)
    with pytest.raises(ValueError, match="images have 4 channels, and the image processor makes images of 5"):
        extract_features(model, ImageList([several[0][..., :4]]), processor)


def test_batches_and_workers_change_nothing(tmp_path):
    save_tiny_vit(tmp_path)
    model, processor = load_model(str(tmp_path))
    images = ImageList(pictures())
    expected = extract_features(model, images, processor).cls
    for settings in ({"batch_size": 2}, {"batch_size": 2, "num_workers": 2}):
        torch.testing.assert_close(extract_features(model, images, processor, **settings).cls, expected)
    rounded = extract_features(model, images, processor, bf16=True).cls
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.05)


def test_tokens_of_past_batches_are_let_go(tmp_path):
    save_tiny_vit(tmp_path)
    model, processor = load_model(str(tmp_path))
    tokens, held = [], []
    model.register_forward_hook(
        lambda module, args, output: tokens.append(StorageWeakRef(output.last_hidden_state.untyped_storage()))
    )

    class Watching(ImageList):
        def image(self, i):
            held.append(sum(not storage.expired() for storage in tokens))
            return super().image(i)

    extract_features(model, Watching(pictures()), processor, batch_size=1, with_patches=True)
    assert len(tokens) == 5
    assert max(held) == 1  # those of the batch before


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [(Terminal, "photos", True), (Terminal, None, False), (io.StringIO, "photos", False)],
)
def test_progress_is_for_terminals(stream, progress, shown, tmp_path, monkeypatch):
    save_tiny_vit(tmp_path)
    model, processor = load_model(str(tmp_path))
    monkeypatch.setattr("sys.stderr", stream())
    extract_features(model, ImageList(pictures()), processor, progress=progress)
    text = sys.stderr.getvalue()
    assert ("photos: 100%" in text and "5/5" in text and " images/s" in text) is shown
    assert bool(text) is shown


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_is_for_the_while(training, tmp_path):
    """In training mode even a frozen network draws random RoPE scales."""
    save_tiny_vit(tmp_path, pos_embed_rescale=2.0, drop_path_rate=0.5)
    model, processor = load_model(str(tmp_path))
    model.train(training)
    first, second = (extract_features(model, ImageList(pictures()), processor).cls for _ in range(2))
    assert torch.equal(first, second)
    assert model.training is training


def test_center_crop_is_resize_and_crop_of_torchvision():
    for size in ((300, 200), (200, 333), (50, 50)):
        picture = Image.fromarray(pictures(1, size)[0])
        usual = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
        ours, theirs = (np.asarray(image, dtype=float) for image in (center_crop(picture, 224), usual(picture)))
        assert ours.shape == theirs.shape == (224, 224, 3)
        assert np.abs(ours - theirs).mean() < 3  # the long side is rounded, there it is cut
    assert center_crop(pictures(1)[0], 32).size == (32, 32)
    assert center_crop(np.zeros((9, 7, 1), np.uint8), 14).mode == "L"


def test_input_size():
    assert input_size(build_image_processor(image_size=48)) == 48
    crop = transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert input_size(crop) == 224
    with pytest.raises(ValueError, match="not square; give the size"):
        input_size(build_image_processor(size={"height": 32, "width": 48}))


def test_sizes_that_do_not_divide(tmp_path):
    model = save_tiny_vit(tmp_path)
    assert patch_grid(model, 32, 48) == (4, 6)
    for size, remedy in ((30, "use 24 or 32"), (3, "use 8"), (0, "use 8")):
        with pytest.raises(ValueError, match=f"image size {size} is not a multiple of the patch size 8; {remedy}"):
            check_divisible(size, 8)
    _, processor = load_model(str(tmp_path))
    with pytest.raises(ValueError, match="image size 20 is not a multiple"):
        extract_features(model, ImageList(pictures()), processor, size=20)


class Unreadable:
    """Images of which the fourth cannot be read."""

    def __len__(self):
        return 6

    def image(self, i):
        if i == 3:
            raise ValueError("cannot read image 3")
        return pictures(1)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(num_workers, tmp_path):
    model = save_tiny_vit(tmp_path)
    _, processor = load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"^cannot read image 3$"):
        extract_features(model, Unreadable(), processor, batch_size=2, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])  # one: a batch with nothing in it
def test_unreadable_images_and_their_labels_are_left_out(num_workers, batch_size, tmp_path):
    model = save_tiny_vit(tmp_path)
    _, processor = load_model(str(tmp_path))
    settings = {"batch_size": batch_size, "num_workers": num_workers, "with_patches": True}
    found = extract_features(model, Unreadable(), processor, range(6), max_unreadable_share=0.2, **settings)
    assert found.unreadable == ("cannot read image 3",)
    assert found.labels.tolist() == [0, 1, 2, 4, 5]
    whole = extract_features(model, ImageList(pictures(1) * 5), processor, **settings)
    torch.testing.assert_close(found.cls, whole.cls)
    torch.testing.assert_close(found.patches, whole.patches)
    with pytest.raises(ValueError, match=r"^1 of 6 images cannot be read, more than max_unreadable_share 0.1 .* 3$"):
        extract_features(model, Unreadable(), processor, max_unreadable_share=0.1, **settings)


def test_images_none_of_which_can_be_read(tmp_path):
    class Nothing(Unreadable):
        def image(self, i):
            raise ValueError(f"cannot read image {i}")

    model = save_tiny_vit(tmp_path)
    _, processor = load_model(str(tmp_path))
    with pytest.raises(ValueError, match="6 of 6 images cannot be read"):
        extract_features(model, Nothing(), processor, max_unreadable_share=1.0)


@pytest.mark.parametrize("patch_size", [None, 16])
def test_patches_of_a_convnext_are_the_positions_of_its_last_map(patch_size):
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], patch_size=patch_size)
    model = DINOv3ConvNextModel(config).eval()
    processor = build_image_processor(image_size=64)
    features = extract_features(model, ImageList(pictures()), processor, with_patches=True)
    with torch.no_grad():
        expected = model(**processor(pictures(), return_tensors="pt")).last_hidden_state
    assert features.grid == (2, 2)
    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="image size 48 is not a multiple of the patch size 32; use 32 or 64"):
        extract_features(model, ImageList(pictures()), processor, size=48)


def test_images_that_do_not_fit(tmp_path):
    model = save_tiny_vit(tmp_path, num_channels=1)
    _, processor = load_model(str(tmp_path))
    with pytest.raises(ValueError, match="there are no images"):
        extract_features(model, ImageList([]), processor)
    with pytest.raises(ValueError, match="5 images have 2 labels"):
        extract_features(model, ImageList(pictures()), processor, labels=[0, 1])
    with pytest.raises(ValueError, match="makes images of 3 channels, and the model takes 1"):
        extract_features(model, ImageList(pictures()), build_image_processor(image_size=32))
    convnext = tiny_stock_model("dinov3_convnext")
    with pytest.raises(ValueError, match="model of type dinov3_convnext has no patches of one size"):
        extract_features(convnext, ImageList(pictures()), build_image_processor(image_size=32), with_patches=True)


def test_folders_that_are_no_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_vit(tmp_path / "run" / "teacher")
    save_tiny_vit(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match=r"run is no model folder .*; give run/teacher\.$"):
        load_model("run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"empty is no model folder .*; give a folder that save_pretrained wrote"
    ):
        load_model("empty")
    for name in ("nowhere", "run/nothing", "./a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"there is no model folder {name}; give one, or the OWNER/NAME"):
            load_model(name)
    with pytest.raises(FileNotFoundError, match="there is no folder owner/name, and as a Hub repository it fails"):
        load_model("owner/name")


def test_a_damaged_model_is_named(tmp_path):
    save_tiny_vit(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read .*; copy or download them again"):
        load_model(str(tmp_path))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights \(model.safetensors\); copy or download them again"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read; copy or download the folder again"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("intermediate_size", 24, "do not fit its config.json"), ("num_hidden_layers", 9, "lack layer.")],
)
def test_weights_of_another_architecture_are_refused(field, value, says, tmp_path):
    save_tiny_vit(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    fields = {
        name: entry for name, entry in config.items() if name not in ("stage_names", "out_features", "out_indices")
    }
    file.write_text(json.dumps({**fields, field: value}))
    with pytest.raises(ValueError, match=rf"^the weights of .* {says}.*; give a folder"):
        load_model(str(tmp_path))
