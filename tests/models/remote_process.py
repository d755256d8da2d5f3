"""What users without this package do with folders that carry our code. Called with a FOLDER as its argument.

FOLDER/models/NAME are models of our own types, FOLDER/inputs.pt the arguments of their forward. Writes
FOLDER/again/NAME, the same models saved here, FOLDER/configs/NAME, their configurations saved alone, and
FOLDER/outputs.pt.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    pipeline,
)

torch.set_num_threads(1)


def attempt(open_folder, *arguments):
    try:
        return open_folder(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def outputs_of(source, saved, inputs):
    """Open `source`, run it, save it to `saved` and open that."""
    pretraining = source.name in inputs["crops"]
    auto_class = AutoModelForPreTraining if pretraining else AutoModel
    found = {"untrusted": attempt(auto_class.from_pretrained, source)}
    model, loading = auto_class.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    found["loading"] = {key: sorted(map(str, names)) for key, names in loading.items()}
    found["knows_its_config"] = isinstance(model.config, model.config_class)
    if pretraining:
        crops = dict(inputs["crops"][source.name])
        if "target" in crops:
            crops["target"] = SimpleNamespace(**crops["target"])
        found["loss"] = model(**crops).loss
    else:
        pixels = inputs["pixels"][source.name]
        found["last_hidden_state"] = model(pixels).last_hidden_state
        backbone_class = type(AutoBackbone.from_config(model.config, trust_remote_code=True))
        backbone = backbone_class.from_pretrained(source, out_indices=[1, 2])
        found["feature_maps"] = backbone(pixels).feature_maps
    model.save_pretrained(saved)
    again = auto_class.from_pretrained(saved, trust_remote_code=True)
    found["state_dict"] = again.state_dict()
    return found


def main(folder):
    inputs = torch.load(folder / "inputs.pt")
    outputs = {}
    for source in sorted((folder / "models").iterdir()):
        outputs[source.name] = outputs_of(source, folder / "again" / source.name, inputs)
        config = AutoConfig.from_pretrained(source, trust_remote_code=True)
        config.save_pretrained(folder / "configs" / source.name)
    source = folder / "models" / "rmsnorm"
    assert AutoImageProcessor.from_pretrained(source).image_mean[0] == 0.43
    extract = pipeline("image-feature-extraction", str(source), trust_remote_code=True)
    outputs["pipeline"] = extract(inputs["picture"], return_tensors=True)
    torch.save(outputs, folder / "outputs.pt")


main(Path(sys.argv[1]))
