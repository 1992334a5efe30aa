"""Write docs/presets.md: what the presets are and what every method costs in each of them.

Run from the repository: python docs/presets.py (a minute or two on one core, less than 2 GB of memory).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from pipeline import config
from pipeline.config import ImageParams, Params, TextData, TextModel, TextParams
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.build import Spec, build
from pipeline.models.flops import active_parameters, flops_per_patch, flops_per_token
from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.moe.layer import SETTINGS, Mode
from pipeline.moe.routers.base import Settings

ROOT = Path(__file__).parent.parent
MILLION = 1e6

# Entries of vocabularies that take all words of a corpus, with <eos> and <unk>.
WORDS = {"wikitext-103": 267_735}
# Classes, training examples, and the paper's learning rate, epochs and batch.
TASKS = {
    "sst2": (2, 6_920, "1e-4", 5, 16),
    "sst5": (5, 8_544, "1e-4", 5, 16),
    "imdb": (2, 22_500, "1e-4", 5, 4),
    "banking77": (77, 9_000, "1e-5", 50, 16),
}

TEXT = """# Presets

A preset is a whole `params.yaml`. `vqmoe preset` lists them, a line each. To run one:

```
vqmoe preset paper/enwik8-transformer-xl > params.yaml && dvc repro
vqmoe train --params presets/tiny.yaml --method smoe     # or one method, in a folder of its own
```

`tiny` shows in a minute and a half that everything works, `toy` in seconds that a change of yours runs, as
[how-to](how-to/README.md) has it. `evidence/text` compares all methods on the embedded corpus with two seeds,
`evidence/robustness` puts the paper's five methods and dense under noise with three seeds and three tasks;
[EXPERIMENTS.md](EXPERIMENTS.md) has what came out. `paper/<corpus>-<model>` are the published settings of
[arXiv 2411.19402](https://arxiv.org/abs/2411.19402): 4 layers of width 256 with 8 heads of 64, 16 experts of 512 and 16 codes,
post-norm, dropout 0.1; Adam with beta2 0.999 from 3.5e-4 by a cosine to 0, no ramp, gradients clipped at 0.25, 100,000 steps of
44 (enwik8, text8), 22 (WikiText-103) or 11 (One Billion Words) segments of 512 tokens; seed 1111; scored 128 tokens at a time.
The Transformer has no memory, Transformer-XL remembers 512 tokens in training and 896 at evaluation. enwik8 and text8 are scored
in bits per character, words in perplexity. `-large` is twice as deep and wide; the released code has no script for it.

## What the paper leaves open, and where we differ

- It does not say how long the warm-up is. Here: 1,000 steps with batch and learning rate of pre-training, for every method.
- What the discrete expert reads is in the paper's equation the code itself. A layer of 16 codes that works alone then has 16
  different answers, so `methods.vqmoe.input` is `residual`, the token plus an embedding of its code; `code` is the equation, and
  `vqmoe_released` does what the released code does. The gate over the paths (`combine: gate`) and the loss are the paper's, and
  no path is ever dropped (`drop_routed: 0.0`), whatever the default experiment does.
- The Transformer learns its absolute positions; the released code adds sinusoids.
- Vocabularies of words are cut for an adaptive softmax with weights of its own (at 20,000, 40,000 and 200,000 for WikiText-103;
  60,000, 100,000 and 640,000 for One Billion Words); the released scripts compute the full softmax. One Billion Words comes
  without a vocabulary: it is made of the 793,471 most frequent entries of the training split, as many as the published one has.
- All methods have the schedule above. HyperRouter's own paper trains with a learning rate of 2.5e-4 for 400,000 steps of 22.
- How often and on how much of the held-out text is validated, and all of `robustness`, is ours.

## Parameters

In millions. Frozen random weights (`smoe_dropout`, `hyperrouter`) are none. `ids` are the entries of the vocabulary and one for
padding; WikiText-103 has 267,735 entries, `<eos>` among them, which is known without the data. `stablemoe` has an embedding of
all ids in every layer. The last column is what the scores of one token cost, on top of the tables below; in an adaptive softmax,
a rare word costs more than a frequent one.

{sizes}
## Work per token

A table for all presets whose models differ in the vocabulary alone.

- Modes: in training and, if it is another one, at inference; [README.md](../README.md) says what they do.
- Active parameters, in millions: those of the blocks that a token meets, which are attention, normalisations, router or codebook,
  and the experts that it goes to. Embeddings and scores, the same for all methods, are left out.
- MFLOPs: of a forward pass to the last hidden state. Training has the shape of pre-training, memory included; inference that of
  fine-tuning, `model.context` tokens without memory. A backward pass costs about twice a forward one.
- `smoe_dropout` and `hyperrouter` begin training with half of the experts and end with all, which is what stands here. What
  `competesmoe` spends on competitions (in 7 % of a layer's steps), and what `drop_routed` may save, is not in a
  forward pass as it is counted here; in the training steps that `vqmoe compute` counts and times, both are, as often as they
  happen.

{costs}## Vision

`vision/digits` and `vision/cifar10` are sized for two CPU cores; `paper/<set>-vit-<size>` are the usual sizes of a ViT (tiny:
width 192, small: 384, base: 768; 12 blocks, experts in every other one), for a GPU; their training settings are ours, since the
paper gives none. `vision/cifar10` and the others fetch what torchvision knows; see [data/README.md](../data/README.md).

Parameters and active parameters in millions, all of the model, for ten labels; MFLOPs of a forward pass per patch, without a
limit for `vmoe`'s experts, which save what they turn away in training. `softmoe` has twice as many slots as there are patches.

{vision}
## Other tasks

The paper's presets fine-tune SST-2. For another task name it under `data.tasks` and change all of these, with `-S
finetune.steps=2670` and so on after `dvc exp run`, which keeps the language models, or after `vqmoe train`:

{tasks}
Steps are the paper's epochs, times the batches of one epoch. IMDB and BANKING77 come without a validation split: a tenth of each
class is held out of training. A text longer than 512 tokens, as most reviews of IMDB are where tokens are characters, is read
from a random place in training and scored by its first 512.

## Data and time

The first `prepare` downloads corpus and task; [data/README.md](../data/README.md) has sizes, splits, licences, and what to do
without a network.

The `paper` presets ask for a GPU, in bfloat16 (`machine`). For enwik8's Transformer-XL, 100,000 steps of 44 x 512 tokens at 3 x
23 MFLOPs, forward and backward, are 1.6e17 operations per method: on a CPU, with `machine.device: cpu` and `machine.precision:
fp32`, 18 days at a sustained 100 billion per second. None of the `paper` presets has been trained here.

`python docs/presets.py` writes this page.
"""


def load() -> dict[str, Params]:
    """Every preset by its name."""
    folder = ROOT / "presets"
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: config.load(files[name], SETTINGS) for name in sorted(files)}


def texts(presets: Mapping[str, Params]) -> dict[str, TextParams]:
    return {name: params for name, params in presets.items() if isinstance(params, TextParams)}


def images(presets: Mapping[str, Params]) -> dict[str, ImageParams]:
    return {name: params for name, params in presets.items() if isinstance(params, ImageParams)}


def language_model(model: TextModel, method: str, settings: Settings, ids: int) -> Transformer:
    return build(Spec(kind="language-model", method=method, settings=settings, model=model, vocabulary=ids)).eval()


def vocabulary(data: TextData) -> int:
    """Number of ids, padding included."""
    if data.tokenizer in ("bytes", "characters"):
        return Tokenizer.make(data.tokenizer, (), 0).size
    return (data.vocabulary or WORDS[data.corpus]) + 1


def sizes(presets: Mapping[str, Params]) -> str:
    """Table of parameters: a row per preset, a column for all methods that are equal in every row."""
    ids, scores, columns = [], [], {method: [] for method in next(iter(presets.values())).methods}
    for params in presets.values():
        ids.append(f"{vocabulary(params.data):,}")
        for method, column in columns.items():
            with torch.device("meta"):
                model = language_model(params.model, method, params.method(method), vocabulary(params.data))
            column.append(short(count(model) / MILLION))
        scores.append(_scores(model))
    grouped = _groups({method: tuple(column) for method, column in columns.items()})
    heads = ["preset", "ids", *(", ".join(methods) for _, methods in grouped), "scores, MFLOPs"]
    return table(heads, zip((f"`{name}`" for name in presets), ids, *(column for column, _ in grouped), scores, strict=True))


def costs(presets: Mapping[str, Params]) -> str:
    """Tables of active parameters and FLOPs: one for all presets, and a row for all methods, that are equal."""
    heads = ["method", "modes", "active, training", "MFLOPs", "active, inference", "MFLOPs"]
    tables = {}
    for name, params in presets.items():
        model = params.model.model_copy(update={"cutoffs": ()})  # nothing here depends on how a token is scored
        tables[name] = tuple((method, _work(model, method, params.method(method))) for method in params.methods)
    text = ""
    for rows, names in _groups(tables):
        grouped = [(", ".join(methods), *row) for row, methods in _groups(dict(rows))]
        text += f"{', '.join(f'`{name}`' for name in names)}:\n\n{table(heads, grouped)}\n"
    return text


@cache
def _work(model: TextModel, method: str, settings: Settings) -> tuple[str, ...]:
    """Modes, active parameters and MFLOPs per token, in training and at inference."""
    made = language_model(model, method, settings, ids=1)  # of an embedding of ids, a token meets one row
    cells = []
    for mode, memory in ((made.train_mode, model.memory), (made.infer_mode, 0)):
        flops = flops_per_token(made, mode, model.context, memory)
        cells += [short(active(made, mode) / MILLION), short(flops / MILLION)]
    return ", ".join(dict.fromkeys((made.train_mode, made.infer_mode))), *cells


def image_classifier(params: ImageParams, method: str, labels: int = 10) -> Vit:
    channels = 3 if params.data.view == "rgb" else 1
    described = {"settings": params.method(method), "model": params.model, "channels": channels, "size": params.prepare.size}
    return build(Spec(kind="image-classifier", method=method, labels=tuple(map(str, range(labels))), **described)).eval()


def vision(presets: Mapping[str, ImageParams]) -> str:
    """Table of parameters and work of the methods of each grid, for ten labels."""
    heads = ["preset", "method", "modes", "parameters", "active, training", "MFLOPs", "active, inference", "MFLOPs"]
    rows = []
    for name, params in presets.items():
        for method in params.grid.methods:
            model = image_classifier(params, method)
            modes, cells = (model.train_mode, model.infer_mode), [short(count(model) / MILLION)]
            for mode in modes:
                cells.append(short(active_parameters(model, mode) / MILLION))
                cells.append(short(flops_per_patch(model, mode) / MILLION))
            rows.append((f"`{name}`", method, ", ".join(dict.fromkeys(modes)), *cells))
    return table(heads, rows)


def active(model: Transformer, mode: Mode) -> int:
    """Parameters of the blocks that a token meets."""
    return active_parameters(model, mode) - (count(model) - count(model.blocks))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tasks() -> str:
    """Table of overrides for each task."""
    heads = ["data.tasks", "classes", "training examples", "epochs", "finetune.batch", "finetune.learning_rate"]
    heads += ["finetune.steps", "finetune.validate_every"]
    rows = []
    for name, (classes, examples, rate, epochs, batch) in TASKS.items():
        epoch = -(-examples // batch)
        rows.append((name, classes, f"{examples:,}", epochs, batch, rate, epochs * epoch, epoch))
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (heads, *rows)]
    lines.insert(1, f"|---{'|---:' * (len(heads) - 1)}|")
    return "\n".join(lines) + "\n"


def short(value: float) -> str:
    """Three digits, at most two of them decimals."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def _scores(model: Transformer) -> str:
    """MFLOPs for the scores of one token: a multiply-add, which is two, for every weight that takes part."""
    if model.adaptive is None:
        return short(2 * count(model.embedding) / MILLION)
    head, tails = count(model.adaptive.head), [count(tail) for tail in model.adaptive.tail]
    return f"{short(2 * head / MILLION)} to {short(2 * (head + max(tails)) / MILLION)}"


def _groups(values: Mapping[str, tuple]) -> list[tuple[tuple, list[str]]]:
    """Each different value with the names that have it."""
    return [(value, [name for name in values if values[name] == value]) for value in dict.fromkeys(values.values())]


if __name__ == "__main__":
    found = load()
    text = TEXT.format(sizes=sizes(texts(found)), costs=costs(texts(found)), vision=vision(images(found)), tasks=tasks())
    (ROOT / "docs/presets.md").write_text(text, encoding="utf-8")
