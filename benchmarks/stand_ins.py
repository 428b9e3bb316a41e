"""
Stand-ins for the repositories of the thesis scale, with random weights: ``python benchmarks/stand_ins.py TOKENIZER_FOLDER``.

Speed and memory do not depend on the weights, so ``HF_HUB_OFFLINE=1 pytest benchmarks --peft-scale thesis --peft-data DIR`` shows
afterwards what the study costs on a machine that cannot reach the Hub. The accuracies of such a run mean nothing. The folder holds
the tokenizer of BERT's uncased vocabulary, and ``HF_HOME`` says where the Hub's cache is.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, DistilBertConfig, PretrainedConfig

from peftbench.models import save_classifier
from peftbench.phases import SCALES

COMMIT = 40 * "0"
CONFIGS = {
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "distilbert": DistilBertConfig(),
}
ADDED = ("output.dense.weight", "out_lin.weight", "lin2.weight")
"""Names of BERT's and DistilBERT's weights that make what is added to a layer's input."""


def write_repositories(tokenizer_folder: Path, cache: Path) -> None:
    """
    Put the three repositories into the Hub's cache; the teacher is the backbone, head included, in the same file on disk.

    Raises:
        FileExistsError: If one of them is there already.
    """
    scale = SCALES["thesis"]
    sources = [role.source for role in (scale.backbone, scale.student, scale.teacher)]
    repositories = [cache / repo_folder_name(repo_id=source, repo_type="model") for source in sources]
    if there := [str(repository) for repository in repositories if repository.exists()]:
        raise FileExistsError(f"stand-ins replace nothing, and this is there already: {', '.join(there)}; point HF_HOME elsewhere")
    backbone, student, teacher = [repository / "snapshots" / COMMIT for repository in repositories]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    write_checkpoint(CONFIGS["bert-large"], tokenizer, backbone)
    write_checkpoint(CONFIGS["distilbert"], tokenizer, student)
    teacher.mkdir(parents=True)
    for file in backbone.iterdir():
        (teacher / file.name).hardlink_to(file)
    for repository in repositories:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT, "utf-8")


def write_checkpoint(config: PretrainedConfig, tokenizer: Any, folder: Path) -> None:
    """
    A two-label classifier with random weights, always the same, and its tokenizer.

    What a layer adds to its input is drawn smaller the more layers there are, as in GPT-2 (Radford et al. 2019, section 2.3).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(ADDED):
            parameter.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    save_classifier(model, tokenizer, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/stand_ins.py TOKENIZER_FOLDER")
    try:
        write_repositories(Path(sys.argv[1]), Path(constants.HF_HUB_CACHE))
    except FileExistsError as error:
        sys.exit(str(error))
