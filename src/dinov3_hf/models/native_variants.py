"""Configurations with two model types: that of transformers where it can represent the network, else our own."""

import os
from typing import Any, ClassVar

from dinov3_hf.models.remote_code import RemoteCodeConfigMixin


class NativeVariantsConfigMixin(RemoteCodeConfigMixin):
    """
    For configurations whose `is_stock_representable` chooses the model type. Comes before `PreTrainedConfig` in the
    bases.

    In the file of a network that transformers cannot represent, `hidden_field` stands under the name
    `native_` + `hidden_field`, and is itself null. A class of transformers that is given such a file by hand only
    warns about the model type, would load the weights and compute something else; a null in this field it refuses.
    """

    family: ClassVar[str]  # in messages
    stock_model_type: ClassVar[str]
    native_model_type: ClassVar[str]
    hidden_field: ClassVar[str]

    def restore_hidden_field(self, fields: dict[str, Any]) -> None:
        """Take the hidden value out of `fields`, those that the configuration does not declare, if it is there."""
        value = fields.pop(f"native_{self.hidden_field}", None)
        if value is not None:
            setattr(self, self.hidden_field, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the `model_type` under which the network is to be opened."""
        fields = super().to_dict()
        if self.is_stock_representable:
            return {**fields, "model_type": self.stock_model_type}
        hidden = {f"native_{self.hidden_field}": fields[self.hidden_field], self.hidden_field: None}
        return {**fields, **hidden, "model_type": self.native_model_type}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        The fields found at a folder or Hub id; both of our model types are read by both configuration classes.

        Raises:
            ValueError: The checkpoint is of another architecture.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type", cls.model_type)
        if found not in (cls.stock_model_type, cls.native_model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found!r} model, not a {cls.family}; "
                f"use a checkpoint of model_type {cls.stock_model_type} or {cls.native_model_type}."
            )
        return {**fields, "model_type": cls.model_type}, kwargs
