"""Opens composed models where this package is not installed. Called with a FOLDER as its argument.

FOLDER/NAME are composed models. Writes FOLDER/predictions.pt: name -> main output and module of the backbone inside,
or the error.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

from tests.models.compositions import backbone_of, pixels, prediction_of

torch.set_num_threads(1)


@torch.no_grad()
def prediction_from(source):
    [name] = AutoConfig.from_pretrained(source).architectures
    model, loading = getattr(transformers, name).from_pretrained(source, output_loading_info=True)
    assert not any(loading.values()), loading
    return prediction_of(model, pixels()), type(backbone_of(model)).__module__


def main(folder):
    predictions = {}
    for source in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            predictions[source.name] = prediction_from(source)
        except Exception as error:
            predictions[source.name] = f"{type(error).__name__}: {error}"
    torch.save(predictions, folder / "predictions.pt")


main(Path(sys.argv[1]))
