"""What users without this package do with a dino.txt folder. Called with FOLDER, RESULTS and labels.

FOLDER/model is the model with its processor, FOLDER/picture.png an image. Writes RESULTS/found.json and RESULTS/again,
the same model and processor saved here.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, pipeline

torch.set_num_threads(1)


def main(folder, results, labels):
    source = folder / "model"
    found = {}
    try:
        AutoModel.from_pretrained(source)
    except ValueError as error:
        found["untrusted"] = str(error)
    classify = pipeline("zero-shot-image-classification", str(source), trust_remote_code=True)
    found["pipeline"] = classify(str(folder / "picture.png"), candidate_labels=labels)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    found["processor"] = [type(processor).__name__, type(processor.tokenizer).__name__]
    classify.model.save_pretrained(results / "again")
    processor.save_pretrained(results / "again")
    (results / "found.json").write_text(json.dumps(found))


main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
