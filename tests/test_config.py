import re
import shutil

import pytest
from dvc.utils.serialize import modify_yaml

from pipeline import config
from pipeline.errors import UsageError
from pipeline.moe.layer import SETTINGS
from tests.conftest import REPOSITORY

PARAMS = REPOSITORY / "params.yaml"


def load(*overrides, path=PARAMS):
    return config.load(path, SETTINGS, overrides)


def test_the_default_loads_and_every_key_has_a_comment():
    load()
    for number, line in enumerate(PARAMS.read_text().splitlines(), 1):
        if line.startswith("  ") and not line.rstrip().endswith(":") and not line.startswith("  - "):
            assert "#" in line, f"params.yaml line {number} has no comment"


def test_an_override_by_dvc_changes_its_own_line_only(tmp_path):
    # `dvc exp run -S` writes the whole file anew, which moves comments and lists of another style.
    path = tmp_path / "params.yaml"
    shutil.copy(PARAMS, path)
    with modify_yaml(path) as content:
        content["model"]["layers"] = 7
    before, after = PARAMS.read_text().splitlines(), path.read_text().splitlines()
    assert [line.split()[:2] for one, line in zip(before, after, strict=True) if one != line] == [["layers:", "7"]]


def test_a_misspelt_key_is_told_before_what_is_missing_for_it_and_with_the_override_it_is_in(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"(?m)^(pretrain:\n  step)s:", r"\1:", PARAMS.read_text()))
    with pytest.raises(UsageError, match=r"^\S+params\.yaml: unknown key pretrain\.step \(did you mean steps\?\); known there"):
        config.load(path, SETTINGS)
    with pytest.raises(UsageError, match=r"^-S pretrain\.step=5: unknown key pretrain\.step"):
        config.load(PARAMS, SETTINGS, ["pretrain.steps=7", "pretrain.step=5"])
    with pytest.raises(UsageError, match=r"^-S methods\.vqmoe\.codes=0: methods\.vqmoe\.codes is 0"):
        config.load(PARAMS, SETTINGS, ["methods.vqmoe.codes=0"])


def test_scientific_and_decimal_notation_are_the_same_number():
    one, other = load("pretrain.learning_rate=1e-4"), load("pretrain.learning_rate=0.0001")
    assert one == other
    assert isinstance(one.pretrain.learning_rate, float)
    assert config.fingerprint(one.pretrain) == config.fingerprint(other.pretrain)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("pretrain.stepz=5", ["unknown key pretrain.stepz", "did you mean steps?"]),
        ("pretrian.steps=5", ["no section 'pretrian'", "did you mean pretrain?"]),
        ("methods.vqmoe.kodes=5", ["unknown key methods.vqmoe.kodes", "did you mean codes?"]),
        ("pretrain.steps=many", ["pretrain.steps is 'many'", "integer"]),
        ("pretrain.steps=1.5", ["pretrain.steps is 1.5", "integer"]),
        ("pretrain.steps=true", ["pretrain.steps is True", "integer"]),
        ("pretrain.steps=0", ["pretrain.steps is 0", "greater than 0"]),
        ("pretrain.learning_rate=.inf", ["pretrain.learning_rate is inf", "finite"]),
        ("methods.smoe.balance=.inf", ["methods.smoe.balance is inf", "finite"]),
        ("grid.methods=vqmoe", ["grid.methods is 'vqmoe'", "a list, such as [a, b]"]),
        ("methods.smoe=2", ["methods.smoe is 2", "a section of keys and values"]),
        ("methods=[smoe]", ["methods is ['smoe']", "a section of keys and values"]),
        ("model.head_width=5", ["model: head_width is 5", "even for rotary positions"]),
        ("model.memory=64", ["model: memory is 64", "must be 0 unless positions are relative"]),
        ("model.evaluate_memory=64", ["model: evaluate_memory is 64", "must be 0 unless positions are relative"]),
        ("model.evaluate_context=512", ["model: evaluate_context is 512", "at most context (256)"]),
        ("model.cutoffs=[20, 10]", ["model.cutoffs", "must rise from entry to entry"]),
        ("model.cutoffs=[0]", ["model.cutoffs.0 is 0", "greater than 0"]),
        ("model.cutoffs=[1, 2, 3, 4]", ["model: cutoffs lists 4", "width must be at least 256"]),
        ("pretrain.beta2=1.0", ["pretrain.beta2 is 1.0", "less than 1"]),
        ("model.expert_width=100", ["model: expert_width is 100", "a multiple of 8"]),
        ("model.norm=middle", ["model.norm is 'middle'", "'pre' or 'post'"]),
        ("methods.vqmoe.codes=9", ["methods.vqmoe", "codes is 9", "multiple of model.experts (8)"]),
        ("methods.smoe.top_k=9", ["methods.smoe", "top_k is 9", "at most model.experts (8)"]),
        ("finetune.crop=512", ["finetune.crop is 512", "at most model.context (256)"]),
        ("methods.xyz={top_k: 1}", ["methods", "'xyz' is no method", "vqmoe, ", "smoe, "]),
        ("grid.methods=[vqmoe, smoo]", ["params.yaml: method 'smoo'", "vqmoe, smoe", "did you mean smoe?"]),
        ("grid.seeds=[1, 1]", ["grid.seeds", "twice"]),
        ("grid.seeds=[-1]", ["grid.seeds.0 is -1"]),
        ("robustness.kinds=[swop]", ["robustness.kinds.0 is 'swop'", "'swap'"]),
        ("robustness.kinds=[swap, swap]", ["robustness.kinds", "twice"]),
        ("robustness.rates=[0.1, 1.5]", ["robustness.rates.1 is 1.5"]),
        ("data.corpus=''", ["data.corpus is ''", "at least 1 character"]),
        ("data.tasks={era: ''}", ["data.tasks.era is ''", "at least 1 character"]),
        ("data.tasks={}", ["data.tasks is {}", "at least 1 item"]),
        ("data.tasks={a/b: era}", ["data.tasks.a/b"]),
        ("data.tasks={language: era}", ["data.tasks: has the name 'language'", "choose another"]),
        ("data.shifts={raw: austen}", ["data.shifts: has the name 'raw'"]),
        ("data.shifts={swap: austen}", ["data.shifts: has the name 'swap'"]),
        ("robustness.kinds=[case]", ["robustness.kinds has case", "text27 has no capitals", "drop it"]),
        ("robustness.attack_rates=[0.05, 0.01]", ["robustness.attack_rates: must rise"]),
        ("robustness.kinds=[swop]", ["robustness.kinds.0 is 'swop'", "'swap', 'delete'"]),
        ("robustness.rates=[1.5]", ["robustness.rates.0 is 1.5", "less than or equal to 1"]),
        ("compute.repeats=1", ["compute.repeats is 1"]),
        ("data.view=latin1", ["data.view is 'latin1'", "text27 or bytes (text), grey or rgb (images)"]),
        ("data.view=[]", ["data.view is []", "text27 or bytes (text)"]),
        ("data.view=rgb", ["data.view is 'rgb'", "another kind of data", "`vqmoe preset vision/digits`"]),
        ("grid.methods=[softmoe]", ["method 'softmoe' has no section under methods"]),
        ("data.tokenizer=letters", ["data.tokenizer is 'letters'", "'bytes', 'characters', 'words' or 'bpe'"]),
        (
            "data={corpus: sotu, view: bytes, tokenizer: characters, vocabulary: 0, tasks: {era: era}, shifts: {}}",
            ["data", "must be text27"],
        ),
        ("data.tokenizer=bpe", ["data: vocabulary is 0", "at least 256"]),
        (
            "data={corpus: sotu, view: bytes, tokenizer: words, vocabulary: 2, tasks: {era: era}, shifts: {}}",
            ["data: vocabulary is 2", "or 0 for all"],
        ),
        ("data.tokenizer=words", ["robustness.kinds has keyboard", "words", "drop it"]),
        ("steps", ["-S steps", "section.key=value"]),
        ("pretrain.steps=[", ["not a YAML value"]),
        ("pretrain.steps=" + 1200 * "[", ["not a YAML value"]),
        ('pretrain.steps=!!int ""', ["not a YAML value"]),
        ("pretrain.steps=!!bool maybe", ["not a YAML value"]),
        ("model.layers.x=3", ["there is no section 'layers'"]),
        ("data.corpus=2020-13-45", ["not a YAML value"]),
    ],
)
def test_bad_values_are_one_line_that_names_key_value_and_remedy(override, parts):
    with pytest.raises(UsageError) as caught:
        load(override)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.view=bytes", ["data.view is 'bytes'", "another kind of data", "`vqmoe preset evidence/text`"]),
        ("model.patch=3", ["model.patch is 3", "must divide prepare.size (8)"]),
        ("model.expert_blocks=[1, 4]", ["model: expert_blocks has 4", "must be below layers (4)"]),
        ("model.expert_blocks=[]", ["model.expert_blocks", "at least 1 item"]),
        ("model.expert_blocks=[3, 1]", ["model.expert_blocks", "must rise"]),
        ("model.width=60", ["model: width is 60", "a multiple of 8"]),
        ("model.context=8", ["unknown key model.context"]),
        ("grid.methods=[stablemoe]", ["method 'stablemoe' has no section"]),
        ("robustness.kinds=[swap]", ["robustness.kinds.0 is 'swap'", "'gaussian_noise'"]),
        ("robustness.severities=[6]", ["robustness.severities.0 is 6", "less than or equal to 5"]),
        ("robustness.attacks=[cw]", ["robustness.attacks.0 is 'cw'", "'fgsm' or 'pgd'"]),
        ("prepare.broken=ignore", ["prepare.broken is 'ignore'", "'refuse' or 'skip'"]),
        ("data.tasks={images: digits}", ["data.tasks: has the name 'images'", "choose another"]),
        ("methods.vmoe.priority=first", ["methods.vmoe.priority is 'first'", "'batch' or 'none'"]),
    ],
)
def test_bad_values_of_images(override, parts):
    with pytest.raises(UsageError) as caught:
        config.load(REPOSITORY / "presets/vision/digits.yaml", SETTINGS, [override])
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_methods_for_the_other_kind_of_data_are_refused(tmp_path):
    text, images = tmp_path / "text.yaml", tmp_path / "images.yaml"
    more = {
        "softmoe: {slots: 1}": ["grid.methods has softmoe", "is for images"],
        "vmoe: {top_k: 2, balance: 0.01, capacity: 1.0, priority: batch}": ["grid.methods has vmoe", "methods.vmoe.capacity: 0"],
    }
    whole = (REPOSITORY / "params.yaml").read_text()
    for section, parts in more.items():
        name = section.partition(":")[0]
        text.write_text(whole.replace("methods:\n  vqmoe:", f"methods:\n  {section}\n  vqmoe:"))
        with pytest.raises(UsageError) as caught:
            config.load(text, SETTINGS, [f"grid.methods=[{name}]"])
        for part in parts:
            assert part in str(caught.value)
    config.load(text, SETTINGS, ["grid.methods=[vmoe]", "methods.vmoe.capacity=0.0"])
    whole = (REPOSITORY / "presets/vision/digits.yaml").read_text()
    stable = "stablemoe: {top_k: 2, balance: 0.3, distil: 0.3, distil_share: 0.1, token_width: 50}"
    images.write_text(whole.replace("methods:\n  vqmoe:", f"methods:\n  {stable}\n  vqmoe:"))
    with pytest.raises(UsageError, match=r"grid\.methods has stablemoe: it routes tokens by their ids"):
        config.load(images, SETTINGS, ["grid.methods=[stablemoe]"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"model: [", "not valid YAML, line 1: expected the node content"),
        (b"model: 1\nmodel: 2\n", "not valid YAML, line 2: found duplicate key"),
        (b"model: &a 1\ngrid: &a 2\n", "not valid YAML: found duplicate anchor"),
        (b"model: !!bool x\n", "not valid YAML"),
        (b"model: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"- 1\n", "holds list"),
        (b"", "holds NoneType"),
        (b"model: \xff\n", "not UTF-8 (byte 7)"),
        (b"model: {}\n", "is missing"),
    ],
)
def test_files_that_are_no_params(tmp_path, content, part):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load(path=path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_no_text_is_unknown_like_any_other(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("1: 2\n" + PARAMS.read_text())
    with pytest.raises(UsageError, match="there is no section 'pretrian'"):
        load("pretrian.steps=5", path=path)
    with pytest.raises(UsageError, match="1 is 1: keys should be strings"):
        load(path=path)


def test_relative_positions_allow_memory_and_any_length_of_evaluation():
    keys = ("positions=relative", "memory=512", "evaluate_memory=896", "evaluate_context=1024")
    assert load(*(f"model.{key}" for key in keys)).model.evaluate_memory == 896


def test_a_missing_params_file(tmp_path):
    with pytest.raises(UsageError, match="no such params file"):
        load(path=tmp_path / "none.yaml")


def test_a_stage_sees_only_what_it_declares():
    chosen = load().select(("data", "model"), "vqmoe")
    assert chosen.method.codes == 8
    with pytest.raises(AttributeError):
        _ = chosen.pretrain


def test_changing_one_methods_params_changes_only_its_fingerprint():
    before, after = load(), load("methods.smoe.balance=0.5")
    for method, same in (("vqmoe", True), ("smoe", False)):
        one, other = (config.fingerprint(params.select(("data",), method)) for params in (before, after))
        assert (one == other) is same


def test_params_file_in_another_folder(tmp_path):
    copy = tmp_path / "mine.yaml"
    shutil.copy(PARAMS, copy)
    assert load(path=copy) == load()


@pytest.mark.parametrize("name", ["params.yaml", "presets/tiny.yaml", "presets/vision/digits.yaml"])
def test_dumped_params_are_read_back_as_the_same(tmp_path, name):
    params = config.load(REPOSITORY / name, SETTINGS, ("pretrain.learning_rate=1e-5", "data.corpus='dätä/\U0001f4da: #1'"))
    (tmp_path / "params.yaml").write_text(config.dump(params), encoding="utf-8")
    assert config.load(tmp_path / "params.yaml", SETTINGS) == params
