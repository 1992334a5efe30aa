import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import serving
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import UsageError
from pipeline.models.build import build
from pipeline.moe import stats
from pipeline.moe.quantizers import QUANTIZERS
from pipeline.serving.routing import Layer, Noise, Routed, changed, contexts, pieces, route_ids, route_image, route_text
from pipeline.training import checkpoint
from tests.models.test_vit import spec as vision_spec

TEXT = "What of it: 15 cats, Ünïts. " * 4  # several windows of the tiny context, the last one shorter


@pytest.mark.parametrize("method", ["vqmoe", "smoe", "vqmoe_released", "dense"])
def test_a_text_is_routed_as_window_after_window_by_itself(served, method):
    folder = served(method=method)
    model, spec = checkpoint.open_model(folder)
    routed = route_text(serving.load(folder), TEXT)
    assert "".join(routed.pieces) == TEXT and len(routed.pieces) == len(TEXT.encode())
    assert (routed.source_T == np.arange(len(routed.pieces))).all()
    ids = torch.tensor(list(TEXT.encode()))
    alone = [model(window[None], model.infer_mode).layers for window in ids.split(spec.model.context)]
    assert len(alone) > 3 and len(ids) % spec.model.context
    for layer, *outputs in zip(routed.layers, *alone, strict=True):
        assert np.array_equal(layer.expert_TK, torch.cat([output.index_NK for output in outputs]))
        if method.startswith("vqmoe"):
            assert np.array_equal(layer.code_T, torch.cat([output.code_N for output in outputs]))
            assert np.array_equal(layer.code_T % spec.model.experts, layer.expert_TK[:, 0])
        else:
            assert layer.code_T is None and layer.distance_T is None
        if method == "dense":
            assert layer.margin_T is None
        else:
            assert layer.margin_T.mean() == pytest.approx(stats.margin(torch.cat([output.scores for output in outputs])))


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, None])
def test_distances_are_those_of_states_to_their_codes(served, quantizer, tiny_params):
    """Naively, from the states that reach the layer; of the method as released (None) from its codebook."""
    more = {} if quantizer is None else {"settings": _settings(tiny_params, quantizer)}
    folder = served(method="vqmoe" if quantizer else "vqmoe_released", **more)
    model, spec = checkpoint.open_model(folder)
    states = []
    layer = model.moe_layers[0]
    layer.quantizer.register_forward_hook(lambda _, inputs, answer: states.append((inputs[0], answer)))
    routed = route_text(serving.load(folder), TEXT)
    for window in torch.tensor(list(TEXT.encode())).split(spec.model.context):
        model(window[None], model.infer_mode)
    value = [layer.quantizer.codebook_CD[answer.argmax(1)] if quantizer is None else answer.value() for _, answer in states]
    naive = torch.cat([(x - v).double().square().sum(1) for (x, _), v in zip(states, value, strict=True)])
    np.testing.assert_allclose(routed.layers[0].distance_T, naive.detach().numpy(), rtol=1e-3, atol=1e-4)


def _settings(tiny_params, quantizer):
    return tiny_params(f"methods.vqmoe.quantizer={quantizer}", "methods.vqmoe.combine=gate").method("vqmoe")


def test_a_classifier_routes_what_it_reads(served, tiny_params):
    routed = route_text(serving.load(served("classifier")), TEXT)
    assert "".join(routed.pieces) == TEXT.encode()[: tiny_params().model.context].decode()


@pytest.mark.parametrize("kind", ["swap", "delete", "insert", "replace"])
def test_noise_is_traced_to_the_clean_text(served, kind, tiny_params):
    model, context = serving.load(served()), tiny_params().model.context
    clean, noised = (route_text(model, "abcdefgh" * 20, noise) for noise in (None, Noise(kind, 0.2, 3)))
    again = route_text(model, "abcdefgh" * 20, Noise(kind, 0.2, 3))
    assert noised.pieces == again.pieces != clean.pieces
    if kind != "replace":
        kept = noised.source_T >= 0
        assert [noised.pieces[i] for i in np.flatnonzero(kept)] == [clean.pieces[i] for i in noised.source_T[kept]]
    assert (noised.source_T < 0).any() == (kind == "insert")
    # What comes from a window stays in it, however much of it noise drops or adds.
    lengths = np.bincount(noised.source_T[noised.source_T >= 0] // context)
    assert len(lengths) == 5 and lengths.max() <= context
    for before, after, moved_T in zip(clean.layers, noised.layers, changed(clean, noised), strict=True):
        for place, origin in enumerate(noised.source_T):
            other = origin >= 0 and set(before.expert_TK[origin]) != set(after.expert_TK[place])
            assert moved_T[place] == other
    with pytest.raises(UsageError, match="corruption 'smudge' does not exist"):
        route_text(model, "abc", Noise("smudge", 0.1, 0))


def test_the_order_of_two_experts_is_no_change():
    def routed(*experts):
        return Routed(list("ab"), np.array([0, 1]), [Layer(np.array(experts), None, None, None)])

    assert [one.tolist() for one in changed(routed([0, 1], [0, 1]), routed([1, 0], [0, 2]))] == [[False, True]]


def test_contexts_are_those_of_the_nearest_tokens_and_each_is_there_once():
    text = list("xaxbxaxb") * 10
    code_T = np.array([{"a": 0, "b": 2}.get(letter, 1) for letter in text])
    distance_T = np.arange(len(text), 0, -1).astype(float)  # the last is the nearest
    (of_code,) = contexts(Routed(text, np.arange(len(text)), [Layer(code_T[:, None], code_T, None, distance_T)]), len(text))
    assert set(of_code) == {0, 1, 2}
    assert [context.token for context in of_code[0]] == ["a"] * len(of_code[0])
    assert of_code[2][0].value == 1.0 and of_code[2][0].after == "" and of_code[2][0].before == "".join(text)[-25:-1]
    values = [context.value for context in of_code[1]]
    assert values == sorted(values) and len({context[:3] for context in of_code[1]}) == len(values) > 1
    # Without codes: the widest margins of each expert; without margins nothing.
    (of_expert,) = contexts(Routed(text, np.arange(len(text)), [Layer(code_T[:, None], None, distance_T, None)]), len(text))
    assert of_expert[0][0].value == max(distance_T[code_T == 0])
    assert contexts(Routed(text, np.arange(len(text)), [Layer(code_T[:, None], None, None, None)]), len(text)) == [{}]


def test_a_context_ends_where_the_model_has_not_read():
    text, code_T = list("abcdefgh"), np.zeros(8, int)
    layer = Layer(code_T[:, None], code_T, None, np.array([9.0, 9, 9, 9, 1, 9, 9, 0]))
    ((nearest, second, *_),) = (of[0] for of in contexts(Routed(text, np.arange(8), [layer]), 4))
    assert nearest[:3] == ("efg", "h", "") and second[:3] == ("", "e", "fgh")


def test_ids_are_read_in_windows_by_a_classifier_too(served, tiny_params):
    model, context = serving.load(served("classifier")), tiny_params().model.context
    ids = np.arange(3 * context + 5) % 97
    routed, alone = route_ids(model, ids), route_ids(model, ids[context : 2 * context])
    assert len(routed.pieces) == len(ids)
    assert np.array_equal(routed.layers[0].expert_TK[context : 2 * context], alone.layers[0].expert_TK)


def test_pieces_put_together_are_the_text():
    for tokenizer, text in (
        (Tokenizer.bytes(), "Öl für 2 €\n"),
        (Tokenizer.characters(), "one two"),
        (Tokenizer.words(["one two\nthree"]), "two one \nthree "),
        (Tokenizer.bpe(["one two three " * 9], 270), "one two for three"),
    ):
        ids = tokenizer.encode(text)
        assert len(pieces(tokenizer, ids)) == len(ids) and "".join(pieces(tokenizer, ids)) == text
    assert pieces(Tokenizer.bytes(), np.frombuffer("aö".encode(), np.uint8)) == ["a", "", "ö"]


def test_the_patches_of_an_image_are_routed_without_the_class_token(tmp_path, seeded):
    spec = vision_spec(pooling="class").model_copy(update={"view": "rgb"})
    checkpoint.save(tmp_path, build(spec), spec)
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (spec.size, spec.size, 3), dtype=np.uint8)
    Image.fromarray(pixels_HWC).save(tmp_path / "image.png")
    model = serving.load(tmp_path)
    routed = route_image(model, tmp_path / "image.png")
    _, hidden = model.model(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None] / 255, model.model.infer_mode)
    for layer, output in zip(routed.layers, hidden.layers, strict=True):
        assert np.array_equal(layer.expert_TK, output.index_NK[1:]) and len(layer.expert_TK) == np.prod(model.model.grid)
