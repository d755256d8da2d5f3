"""`Trainer`'s way to the Hub, for runs whose outcome is a teacher: its folder, not the training state."""

import shlex
from pathlib import Path
from typing import Any

from transformers import Trainer

from dinov3_hf.hub.push import PushError, create_repository, push_folder
from dinov3_hf.training.recipe_config import RecipeConfig


class TeacherPublisher(Trainer):
    """The part of [`SSLTrainer`] that publishes."""

    args: RecipeConfig
    hub_model_id: str | None  # type: ignore[assignment]  # the full name, once the repository exists

    def save_outcome(self, folder: Path) -> str:
        """Write what the run has come to to `folder`, all ranks together, and return what to tell people."""
        raise NotImplementedError

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository `hub_model_id`, so that a run which cannot be published says so before it begins.

        Raises:
            PushError: the Hub cannot be reached, does not know the user, or refuses.
        """
        if self.is_world_process_zero():
            args = self.args
            self.hub_model_id = create_repository(
                args.hub_model_id or Path(args.output_dir or ".").resolve().name,
                private=args.hub_private_repo if private is None else private,
                token=token or args.hub_token,
            )
            self.push_in_progress = None  # the Trainer waits for it

    def push_to_hub(  # type: ignore[override]  # the address, as in earlier versions of the Trainer
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | None:
        """
        Write the teacher to `output_dir`/teacher and upload it: the model, not the training state.

        Args:
            commit_message: of the commit.
            blocking: only True; the weights in the folder must not change during the upload.
            token: of the Hub; None takes `hub_token`, or the one of `hf auth login`.
            revision: the branch; None takes `hub_revision`, or main.
            private: of a new repository; None takes `hub_private_repo`.
            card: not used; the card says what is known of the run.

        Returns:
            Address of the repository; None on all ranks but the first.

        Raises:
            PushError: the upload failed. The teacher is in its folder; the message has the command that repeats it.
        """
        teacher = Path(self.args.output_dir or ".") / "teacher"
        self.save_outcome(teacher)
        if not self.is_world_process_zero():
            return None
        return self.push_teacher(teacher, commit_message, token, revision, private)

    def push_teacher(
        self,
        teacher: Path,
        message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        """What `push_to_hub` does, with a teacher that has been saved already."""
        args = self.args
        revision = revision or args.hub_revision
        repository = self.hub_model_id or args.hub_model_id or Path(args.output_dir or ".").resolve().name
        try:
            pushed = push_folder(
                teacher,
                repository,
                private=args.hub_private_repo if private is None else private,
                revision=revision,
                message=message,
                token=token or args.hub_token,
            )
        except PushError as error:
            branch = ["--revision", revision] if revision else []
            command = shlex.join(["dinov3-hf", "push", str(teacher), repository, *branch])
            raise PushError(f"{error} The command is: {command}") from error
        return pushed.url
