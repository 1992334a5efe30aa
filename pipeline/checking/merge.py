"""Params of one experiment for data that was looked into one by one."""

from collections.abc import Sequence
from itertools import chain, count

from pipeline.checking.findings import Findings
from pipeline.checking.texts import fitting


def together(every: Sequence[Findings]) -> Findings:
    """What a corpus and tasks ask for at once, and as warnings what had to be decided; a problem if one of them has one."""
    whole = Findings(", ".join(found.path for found in every))
    faulty = [found.path for found in every if found.problem]
    images = [found.path for found in every if found.preset]
    if faulty:
        whole.problem = f"no params for {whole.path}: mend {', '.join(faulty)} first, or leave it out"
    elif 0 < len(images) < len(every):
        other = next(found.path for found in every if not found.preset)
        whole.problem = f"{images[0]} has images and {other} texts: an experiment reads the one or the other; check them apart"
    else:
        _data(whole, every)
        (_images if images else _texts)(whole, every)
    return whole


def _data(whole: Findings, every: Sequence[Findings]) -> None:
    """The section data: what has no labels is a corpus before what has, the first before the others; the rest are tasks."""
    corpora = [found for found in every if found.params["data"]["corpus"] == found.path]
    plain = [found for found in corpora if "classes" not in found.facts]
    corpus = (plain or corpora or every)[0]
    tasks: dict[str, str] = {}
    for found in every:
        if "classes" in found.facts:
            (name,) = found.params["data"]["tasks"]
            names = chain([name], (f"{name}-{number}" for number in count(2)))
            tasks[next(name for name in names if name not in tasks)] = found.path
    whole.params["data"] = corpus.params["data"] | ({"tasks": tasks} if tasks else {})
    for key in ("data.corpus",) if tasks else ("data.corpus", "data.tasks"):
        if note := corpus.notes.get(key):
            whole.notes[key] = note
    if others := [found.path for found in plain or corpora if found is not corpus]:
        more = ", or under data.shifts to score the language model on it too" if plain else ""
        whole.warn(
            f"{corpus.path} is the corpus, the first of those that can be; so can {', '.join(others)}: put it into data.corpus "
            f"instead{more}"
        )


def _texts(whole: Findings, every: Sequence[Findings]) -> None:
    """A view that loses little of any, and a context that holds any and for which every split has enough text."""
    data = whole.params["data"]
    used = [found for found in every if found.path in (data["corpus"], *data["tasks"].values())]
    if kept := [found for found in used if found.params["data"]["view"] == "bytes"]:
        data["view"] = "bytes"
        whole.notes["data.view"] = f"{kept[0].path}: {kept[0].notes['data.view']}"
    tokens = min(size["tokens"] for found in used for size in found.facts["splits"].values())
    context = fitting(max(found.params["model"]["context"] for found in used), tokens)
    labelled = [found for found in used if "classes" in found.facts] or used
    crop = min(max(found.params["finetune"]["crop"] for found in labelled), context)
    whole.params |= {"model": {"context": context, "evaluate_context": context}, "finetune": {"crop": crop}}


def _images(whole: Findings, every: Sequence[Findings]) -> None:
    """The largest size, and colours if any have them."""
    largest = max(every, key=lambda found: found.params["prepare"]["size"])
    coloured = next((found for found in every if found.params["data"]["view"] == "rgb"), every[0])
    broken = "skip" if any(found.params["prepare"]["broken"] == "skip" for found in every) else "refuse"
    whole.preset = coloured.preset
    whole.params["data"] |= {"view": coloured.params["data"]["view"]}
    whole.params |= {"prepare": largest.params["prepare"] | {"broken": broken}, "model": largest.params["model"]}
