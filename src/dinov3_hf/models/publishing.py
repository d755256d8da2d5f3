"""`push_to_hub` of our models."""

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGE = "dinov3_hf"


class PublishingMixin:
    """For models whose repository gets a model card. Comes before `PreTrainedModel` in the bases."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str = "50GB",
        license: str | None = None,
    ) -> str:
        """
        Upload the model, with `extras.safetensors` and with a model card unless the repository has one already.

        Where `dinov3_hf` is not installed (the code came with a model folder) this is what
        [`PreTrainedModel.push_to_hub`] does, with a blank card.

        Args:
            repo_id: OWNER/NAME, or NAME for your own; created when absent.
            commit_message: Of the commit.
            private: Of a new repository; None is the account's default.
            token: None takes the one of `hf auth login` or `HF_TOKEN`.
            revision: The branch, created when absent; None is main.
            max_shard_size: As in `save_pretrained`.
            license: To be stated in the card: an identifier of the Hub, or "dinov3-license" for weights derived from
                the released ones.

        Returns:
            Address of the repository.

        Raises:
            OSError: The upload failed; the same call goes on.
            ValueError: `repo_id` is no name, or the Hub does not know the licence.
        """
        try:
            # By name: publishing stands above the models, and the copy of this code in a folder comes without it.
            push: Any = import_module(f"{_PACKAGE}.hub.push")
        except ModuleNotFoundError:
            stock: Any = super()
            address: str = stock.push_to_hub(
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                max_shard_size=max_shard_size,
            )
            return address
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            pushed = push.push_folder(
                Path(folder),
                repo_id,
                private=private,
                license=license,
                revision=revision,
                message=commit_message or "Upload model",
                token=token,
            )
        url: str = pushed.url
        return url
