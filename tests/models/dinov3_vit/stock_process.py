"""What users without this package do, in a process that cannot import it. Called with a FOLDER as its argument.

FOLDER/ours/NAME are models that we saved, FOLDER/native/NAME those of our own model type, FOLDER/images.safetensors
the inputs. Writes FOLDER/stock/NAME, models of transformers of the same configurations with weights of their own, and
FOLDER/outputs/NAME.safetensors and FOLDER/report.json: what came out.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel

torch.set_num_threads(1)


@torch.no_grad()
def outputs_of(model, folder, pixels, mask):
    """Everything that the stock classes return, by name."""
    model = model.eval()
    found = model(pixels, output_hidden_states=True)
    outputs = {"last_hidden_state": found.last_hidden_state, "pooler_output": found.pooler_output}
    outputs |= {f"hidden_states/{index}": states for index, states in enumerate(found.hidden_states)}
    outputs["masked"] = model(pixels, bool_masked_pos=mask).last_hidden_state
    model.set_attn_implementation("eager")
    attentions = model(pixels, output_attentions=True).attentions
    outputs |= {f"attentions/{index}": attention for index, attention in enumerate(attentions)}
    # AutoBackbone.from_pretrained takes no local folder, whoever wrote it; the class behind it does.
    backbone_class = type(AutoBackbone.from_config(model.config))
    backbone = backbone_class.from_pretrained(folder, out_indices=[0, 2, 3]).eval()
    outputs |= {f"feature_maps/{index}": each for index, each in enumerate(backbone(pixels).feature_maps)}
    return {name: tensor.contiguous() for name, tensor in outputs.items()}


def main(folder):
    try:
        import dinov3_hf  # noqa: F401

        raise SystemExit("dinov3_hf can be imported")
    except ModuleNotFoundError:
        pass
    inputs = load_file(folder / "images.safetensors")
    (folder / "outputs").mkdir()
    report = {"transformers": transformers.__version__, "loading": {}, "classes": {}, "native": {}}

    for source in sorted((folder / "ours").iterdir()):
        model, loading = AutoModel.from_pretrained(source, output_loading_info=True)
        report["classes"][source.name] = f"{type(model).__module__}.{type(model).__name__}"
        report["loading"][source.name] = {key: sorted(map(str, names)) for key, names in loading.items()}
        pixels = inputs[f"pixels_{model.config.num_channels}"]
        processor = AutoImageProcessor.from_pretrained(source)
        report["processor"] = [type(processor).__name__, processor.image_mean, dict(processor.size)]
        save_file(
            outputs_of(model, source, pixels, inputs["mask"]), folder / f"outputs/ours_{source.name}.safetensors"
        )

        torch.manual_seed(1)  # weights of one draw: what rounding makes of others has come up to the tolerance
        theirs = AutoModel.from_config(AutoConfig.from_pretrained(source))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        saved = folder / "stock" / source.name
        theirs.save_pretrained(saved)
        save_file(
            outputs_of(theirs, saved, pixels, inputs["mask"]), folder / f"outputs/stock_{source.name}.safetensors"
        )

    for source in sorted((folder / "native").iterdir()):
        report["native"][source.name] = {}
        for cls in (AutoModel, AutoBackbone, transformers.DINOv3ViTModel, transformers.DINOv3ViTBackbone):
            try:
                cls.from_pretrained(source)
                report["native"][source.name][cls.__name__] = "loaded"
            except Exception as error:
                report["native"][source.name][cls.__name__] = f"{type(error).__name__}: {error}"
    (folder / "report.json").write_text(json.dumps(report))


main(Path(sys.argv[1]))
