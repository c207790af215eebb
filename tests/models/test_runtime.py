"""The runtime: right scores, the same bits whatever the batch, threads or company, and words for everything wrong."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.models.tiny import FORMS, Tiny, block, card_json, graph, lattice, tiny, write_card
from wsiengine.errors import (
    CardError,
    DependencyError,
    DeviceMemoryError,
    IntegrityError,
    ModelError,
    ProviderError,
    ScoreError,
)
from wsiengine.models import ort as module
from wsiengine.models.card import Card, load_card
from wsiengine.models.contract import check_outputs
from wsiengine.models.integrity import file_sha256
from wsiengine.models.ort import CPU, CUDA, TENSORRT, providers
from wsiengine.models.runtime import Runtime, shared_runtime

GOOD = FORMS


def saved(tmp_path: Path, model: Any) -> Card:
    """The model under a card with its right sha256."""
    (tmp_path / "tiny.onnx").write_bytes(model.SerializeToString())
    return load_card(write_card(tmp_path, card_json(sha256=file_sha256(tmp_path / "tiny.onnx"))))


def by_hand(card: Card, pixels: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """The obvious twin: cut, scale and run each tile in a plain session."""
    spec, side = card.input, card.input.size_px
    session = onnxruntime.InferenceSession(str(card.model_path), providers=["CPUExecutionProvider"])
    names = [n for n in (card.outputs.scores, card.outputs.gate) if n]
    rows = []
    for y, x in origins:
        tile = pixels[y : y + side, x : x + side]
        if spec.dtype != "uint8":
            lo, hi = spec.range
            tile = ((lo + tile / 255 * (hi - lo)) - np.array(spec.mean)) / np.array(spec.std)
        tile = tile if spec.layout == "NHWC" else tile.transpose(2, 0, 1)
        outputs = session.run(names, {"tiles": np.ascontiguousarray(tile[None], spec.dtype)})
        rows.append(np.concatenate([out.reshape(-1) for out in outputs]))
    return np.array(rows)


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_scores_are_those_of_each_tile(changes: dict, tmp_path: Path) -> None:
    card = tiny(tmp_path, **changes)
    side = card.input.size_px
    pixels = block(2 * side + 5, 3 * side + 3)
    origins = lattice(*pixels.shape[:2], side, side // 2 + 1)
    scores = Runtime(card).scores(pixels, origins)
    assert scores.dtype == np.float32
    assert scores.shape == (len(origins), card.score_channels)
    tolerance = 2e-3 if changes.get("dtype") == "float16" else 2e-5
    np.testing.assert_allclose(scores, by_hand(card, pixels, origins), atol=tolerance)
    assert len(np.unique(scores[:, 0])) > len(origins) // 2  # the model does tell positions apart


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_bits_do_not_depend_on_batch_threads_order_or_block(changes: dict, tmp_path: Path) -> None:
    card = tiny(tmp_path, **changes)
    side = card.input.size_px
    pixels = block(3 * side + 5, 2 * side + 3)
    origins = lattice(*pixels.shape[:2], side, side // 3 + 1)
    whole = Runtime(card).scores(pixels, origins)
    for threads, batch in [(1, 3), (2, 8), (3, 33), (5, 1)]:
        assert np.array_equal(Runtime(card, threads=threads, batch_size=batch).scores(pixels, origins), whole)
    runtime = Runtime(card)
    assert np.array_equal(runtime.scores(pixels, origins[::-1])[::-1], whole)
    assert np.array_equal(np.concatenate([runtime.scores(pixels, o[None]) for o in origins]), whole)
    part = pixels[side:, 1:]  # a view with a longer pitch than its rows
    inside = (origins[:, 0] >= side) & (origins[:, 1] >= 1)
    assert inside.any()
    assert np.array_equal(runtime.scores(part, origins[inside] - (side, 1)), whole[inside])


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_tiles_are_handed_over_in_aligned_memory(changes: dict, tmp_path: Path) -> None:
    runtime = Runtime(tiny(tmp_path, **changes))
    batches = [runtime._batch() for _ in range(5)]  # all alive, at different addresses
    assert [batch.ctypes.data % 64 for batch in batches] == [0] * 5


def test_callers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    card = tiny(tmp_path, gate=True, size_px=64)
    pixels = block(201, 301)
    origins = lattice(201, 301, 64, 8)
    runtime = Runtime(card)
    expected = runtime.scores(pixels, origins)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(runtime.scores, pixels, origins[i::4]) for i in range(4) for _ in range(3)]
        for number, job in enumerate(jobs):
            assert np.array_equal(job.result(), expected[number // 3 :: 4])


def test_pickles_as_its_arguments_and_shares_one_session(tmp_path: Path) -> None:
    runtime = Runtime(tiny(tmp_path), device="cpu", threads=2, batch_size=4)
    data = pickle.dumps(runtime)
    assert len(data) < 4000  # facts, no weights
    first, second = pickle.loads(data), pickle.loads(data)
    assert first is second
    pixels, origins = block(40, 50), np.array([[0, 0], [7, 11]])
    assert np.array_equal(first.scores(pixels, origins), runtime.scores(pixels, origins))


def test_no_tiles(tmp_path: Path) -> None:
    card = tiny(tmp_path, gate=True)
    assert Runtime(card, threads=2).scores(block(40, 40), np.empty((0, 2), int)).shape == (0, 4)


@pytest.mark.parametrize("origin", [(-1, 0), (0, -1), (9, 0), (0, 19)])
def test_a_tile_that_leaves_its_block(origin: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves the block"):
        Runtime(tiny(tmp_path)).scores(block(40, 50), np.array([(0, 0), origin]))


@pytest.mark.parametrize(
    "pixels", [np.zeros((40, 40), np.uint8), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3))]
)
def test_pixels_of_another_kind(pixels: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needed uint8"):
        Runtime(tiny(tmp_path)).scores(pixels, np.array([(0, 0)]))


@pytest.mark.parametrize("threads", [1, 2])
def test_nan_names_the_tile(threads: int, tmp_path: Path) -> None:
    card = tiny(tmp_path, poison=True)
    pixels = block(70, 90)
    origins = lattice(70, 90, 32, 16)
    runtime = Runtime(card, threads=threads)
    assert np.isfinite(runtime.scores(pixels, origins)).all()
    pixels[16, 48] = (255, 0, 0)  # the corner of the tile at (16, 48)
    with pytest.raises(ScoreError, match=r"gave NaN for the tile at y 16, x 48 px of its block \(1 of 12 tiles"):
        runtime.scores(pixels, origins)


def test_a_gate_that_is_no_fraction(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"gave the gate .* for the tile at y 3, x 4 px of its block, needed 0 to 1"):
        Runtime(tiny(tmp_path, gate=True, gate_scale=100)).scores(block(40, 40), np.array([(3, 4)]))


def test_a_gate_beyond_by_rounding_is_clipped(tmp_path: Path) -> None:
    base = Runtime(tiny(tmp_path / "a", gate=True)).scores(block(40, 40), np.array([(0, 0)]))[0, -1]
    card = tiny(tmp_path / "b", gate=True, gate_scale=1.0005 / base)
    assert Runtime(card).scores(block(40, 40), np.array([(0, 0)]))[0, -1] == 1.0


BAD: list[tuple[dict, str]] = [
    ({"score_name": "probabilities"}, "has the outputs probabilities, gate, cam; .* needs one called 'logits'"),
    ({"score_count": 4}, r"scores of shape \[n, 4\]; .* needs \[N, 3\]"),
    ({"side": 48}, r"an input of shape \[n, 48, 48, 3\]; .* needs \[N, 32, 32, 3\] \(NHWC\)"),
    ({"batch": 4}, "a fixed batch of 4"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_card_that_disagrees_with_its_onnx(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=words):
        Runtime(tiny(tmp_path, **changes))


def lying(tmp_path: Path, built: Tiny, told: Tiny) -> Card:
    """A model built one way under a card that tells another."""
    tiny(tmp_path, **{f: getattr(built, f) for f in built.__dataclass_fields__})
    write_card(tmp_path, card_json(told, file_sha256(tmp_path / "tiny.onnx")))
    return load_card(tmp_path / "card.json")


@pytest.mark.parametrize(
    ("built", "told", "words"),
    [
        (Tiny(), Tiny(dtype="float32"), r"an input of type tensor\(uint8\); .* needs tensor\(float\)"),
        (Tiny(), Tiny(layout="NCHW"), r"an input of shape \[n, h, w, 3\]; .* needs \[N, 3, 32, 32\] \(NCHW\)"),
        (Tiny(classes=4), Tiny(classes=3), r"scores of shape \[n, 4\]"),
    ],
)
def test_a_card_that_lies(built: Tiny, told: Tiny, words: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=words):
        Runtime(lying(tmp_path, built, told))


@pytest.mark.parametrize("shape", [(2, 4), (2,), (3, 3), (2, 3, 1)])
def test_score_shapes_that_show_only_in_a_run(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"scores of shape .* for 2 tiles; .* needs 3 each"):
        check_outputs([np.zeros(shape, np.float32)], 2, tiny(tmp_path))


def test_a_gate_of_more_than_one_number(tmp_path: Path) -> None:
    card = tiny(tmp_path)
    data = card.to_json() | {"outputs": {"scores": "logits", "gate": "cam"}, "gate": {"minimum": 0.1, "otherwise": "x"}}
    write_card(tmp_path, data)
    with pytest.raises(CardError, match=r"a gate of shape \[1, 3, 4, 4\] for 1 tiles; .* needs one number each"):
        Runtime(load_card(tmp_path / "card.json"))


def test_a_model_that_fails_on_its_tiles(tmp_path: Path) -> None:
    model = graph(Tiny())
    shape = next(t for t in model.graph.initializer if t.name == "ramp")
    shape.dims[:] = [1, 1, 1, 3]  # cannot be added to a 4 × 4 map
    with pytest.raises(CardError, match="ONNX Runtime") as caught:
        Runtime(saved(tmp_path, model))
    assert "\n" not in caught.value.message


def test_an_operator_that_nobody_knows(tmp_path: Path) -> None:
    model = graph(Tiny())
    model.graph.node[4].op_type = "Rellu"
    with pytest.raises(CardError, match=r"tiny\.onnx cannot be loaded by ONNX Runtime .*Rellu"):
        Runtime(saved(tmp_path, model))


def test_files_are_checked_again_when_the_session_opens(tmp_path: Path) -> None:
    card = tiny(tmp_path)
    card.model_path.write_bytes(card.model_path.read_bytes() + b"\x00")
    with pytest.raises(IntegrityError, match="sha256"):
        Runtime(card)


def test_cpu_is_named(tmp_path: Path) -> None:
    runtime = Runtime(tiny(tmp_path), device="cpu")
    assert runtime.provider == CPU
    assert runtime.batch_size == 1
    assert runtime.chosen == f"ONNX Runtime {onnxruntime.__version__}, CPU (asked for)"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "cuda:-1", "", "auto:0"])
def test_unknown_devices(device: str, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="needed auto, cpu, cuda, cuda:1"):
        Runtime(tiny(tmp_path), device=device)


@pytest.mark.parametrize(("threads", "batch"), [(0, None), (1, 0), (-1, 4)])
def test_threads_and_batch_are_positive(threads: int, batch: int | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Runtime(tiny(tmp_path), threads=threads, batch_size=batch)


def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])


def test_cuda_without_a_cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_cuda(monkeypatch)
    card = tiny(tmp_path)
    with pytest.raises(ProviderError, match="build has no CUDA") as caught:
        Runtime(card, device="cuda")
    assert "wsiengine[gpu]" in (caught.value.hint or "")
    chosen = Runtime(card, device="auto")
    assert chosen.provider == CPU
    assert "CPU (the installed ONNX Runtime build has no CUDA)" in chosen.chosen


class Fake:
    """A session that claims providers, and counts what it is given; scores as the CPU session inside."""

    def __init__(self, real: Any, claims: list[str]) -> None:
        self.real, self.claims, self.shapes = real, claims, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return self.claims

    def run(self, names: list[str], feed: dict) -> list:
        self.shapes.append(feed["tiles"].shape)
        return self.real.run(names, feed)

    def run_with_iobinding(self, binding: Any) -> None:
        self.real.run_with_iobinding(binding)
        self.shapes.append(binding.get_outputs()[0].shape())


def faked(monkeypatch: pytest.MonkeyPatch, claims: list[str] | None) -> list[Fake]:
    """A build that lists CUDA; sessions that ask for it get ``claims``, or fail where None."""
    made: list[Fake] = []
    real = onnxruntime.InferenceSession

    def session(path: str, options: Any = None, providers: Any = None) -> Any:
        if providers == [CPU]:
            return real(path, options, providers=providers)
        if claims is None:
            raise RuntimeError("CUDA failure 35: driver version is insufficient\nstack")
        made.append(Fake(real(path, options, providers=[CPU]), claims))
        made[-1].asked = providers  # type: ignore[attr-defined]
        return made[-1]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return made


def test_asked_for_cuda_and_got_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, [CPU])
    card = tiny(tmp_path)
    with pytest.raises(ProviderError, match=f"asked for {CUDA}, but the session got {CPU}"):
        Runtime(card, device="cuda")
    assert "the session got" in Runtime(card).chosen


def test_a_hosts_own_sessions_still_log_beside_ours_on_the_cpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    card = tiny(tmp_path)
    onnxruntime.set_default_logger_severity(0)
    try:
        Runtime(card, device="cpu")
        capfd.readouterr()
        onnxruntime.InferenceSession(str(card.model_path), providers=[CPU])
    finally:
        onnxruntime.set_default_logger_severity(2)  # ONNX Runtime's own
    assert "onnxruntime:Default" in capfd.readouterr().err


@pytest.mark.parametrize(("device", "told"), [("cpu", []), ("auto", [4, "session"]), ("cuda", [4, "session"])])
def test_the_logger_of_the_process_is_silent_before_a_gpu_has_a_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, told: list[object]
) -> None:
    made = faked(monkeypatch, [CUDA, CPU])
    said: list[object] = []
    opening = onnxruntime.InferenceSession

    def session(*arguments: Any, **how: Any) -> Any:
        opened = opening(*arguments, **how)
        said.extend(["session"] * len(made))
        return opened

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", said.append)
    Runtime(tiny(tmp_path), device=device)
    assert said == told


def test_a_driver_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, None)
    card = tiny(tmp_path)
    with pytest.raises(ProviderError, match=r"CUDA device 1 refused the session: .*driver version is insufficient\n"):
        Runtime(card, device="cuda:1")
    assert Runtime(card).provider == CPU


def test_a_broken_model_is_not_blamed_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, None)
    model = graph(Tiny())
    model.graph.node[4].op_type = "Rellu"
    with pytest.raises(CardError, match="Rellu"):
        Runtime(saved(tmp_path, model), device="cuda")


def test_cuda_batches_have_one_padded_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = faked(monkeypatch, [CUDA, CPU])
    card = tiny(tmp_path, gate=True)
    pixels, origins = block(70, 90), lattice(70, 90, 32, 8)
    runtime = Runtime(card, device="cuda:2", batch_size=8)
    assert (runtime.provider, runtime.batch_size) == (CUDA, 8)
    assert "CUDA device 2" in runtime.chosen
    scores = runtime.scores(pixels, origins)
    np.testing.assert_allclose(scores, by_hand(card, pixels, origins), atol=1e-5)
    assert made[-1].shapes == [(8, 32, 32, 3), *[[8, 3]] * -(-len(origins) // 8)]
    (name, options), fallback = made[-1].asked  # type: ignore[attr-defined]
    assert (name, options["device_id"], fallback) == (CUDA, "2", CPU)


def test_several_devices_have_a_session_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = faked(monkeypatch, [CUDA, CPU])
    card = tiny(tmp_path)
    pixels, origins = block(120, 150), lattice(120, 150, 32, 4)
    runtime = Runtime(card, device="cuda:0,1", batch_size=4)
    assert [fake.asked[0][1]["device_id"] for fake in made] == ["0", "1"]  # type: ignore[attr-defined]
    assert "CUDA devices 0, 1" in runtime.chosen
    parts = np.array_split(origins, 4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: runtime.scores(pixels, part), parts))
    np.testing.assert_allclose(np.concatenate(found), by_hand(card, pixels, origins), atol=1e-5)
    facts = runtime.batches()
    assert facts is not None
    assert facts["tiles"] == len(origins)
    at_work = runtime.at_work()
    assert len(at_work) == 2
    assert sum(stop - start for periods in at_work for start, stop in periods) == pytest.approx(facts["busy_s"])
    assert facts["busy_s"] > 0
    assert Runtime(card, device="cpu").at_work() == []


def test_tensorrt_keeps_its_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = faked(monkeypatch, [TENSORRT, CUDA, CPU])
    runtime = Runtime(tiny(tmp_path), device="tensorrt:1", batch_size=4)
    assert runtime.provider == TENSORRT
    (name, options), (then, _), last = made[-1].asked  # type: ignore[attr-defined]
    assert (name, then, last) == (TENSORRT, CUDA, CPU)
    assert options["device_id"] == "1"
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path / "cache")
    assert Path(options["trt_engine_cache_path"]).is_dir()


def test_asked_for_tensorrt_and_got_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, [CUDA, CPU])
    with pytest.raises(ProviderError, match=f"asked for {TENSORRT}, but the session got {CUDA}") as caught:
        Runtime(tiny(tmp_path), device="tensorrt")
    assert "libnvinfer" in (caught.value.hint or "")


@pytest.mark.parametrize("changes", [{}, {"gate": True}, {"dtype": "float32", "layout": "NCHW"}])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_on_the_cpu_give_what_single_tiles_give(tmp_path: Path, changes: dict, batch_size: int) -> None:
    card = tiny(tmp_path, **changes)
    pixels, origins = block(90, 110), lattice(90, 110, 32, 8)
    fed = Runtime(card, device="cpu", batch_size=batch_size, batched=True)
    assert fed.batch_size == batch_size
    scores = fed.scores(pixels, origins)
    np.testing.assert_allclose(scores, Runtime(card, device="cpu").scores(pixels, origins), atol=1e-5)
    for few in (0, 1, 3):  # what was in the batch before does not show
        np.testing.assert_array_equal(fed.scores(pixels, origins[:few]), scores[:few])


def test_a_full_device_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = faked(monkeypatch, [CUDA, CPU])
    runtime = Runtime(tiny(tmp_path), device="cuda", batch_size=8)

    def full(binding: Any) -> None:
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(made[-1], "run_with_iobinding", full)
    with pytest.raises(DeviceMemoryError, match="no room for batches of 8 tiles") as caught:
        runtime.scores(block(40, 40), np.array([(0, 0)]))
    assert "--batch-size 4" in (caught.value.hint or "")


def test_a_fixed_batch_is_kept_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, [CUDA, CPU])
    assert Runtime(tiny(tmp_path, batch=4), device="cuda", batch_size=8).batch_size == 4


def builds(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise module.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(module.metadata, "version", version)


def test_both_builds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(DependencyError, match="both onnxruntime and onnxruntime-gpu are installed"):
        Runtime(tiny(tmp_path))
    assert "both" in providers()["problem"]


def test_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds(monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="cannot be imported") as caught:
        Runtime(tiny(tmp_path))
    assert "wsiengine[cpu]" in (caught.value.hint or "")
    assert providers()["builds"] == {}


def test_facts_for_the_doctor() -> None:
    facts = providers()
    assert facts["version"] == onnxruntime.__version__
    assert CPU in facts["providers"]
    assert facts["problem"] is None
    assert set(facts["builds"]) <= {"onnxruntime", "onnxruntime-gpu"}


def test_other_failures_in_the_middle_of_a_run(tmp_path: Path) -> None:
    runtime = Runtime(tiny(tmp_path))

    class Broken:
        def run(self, names: list[str], feed: dict) -> list:
            raise RuntimeError("out of memory\nmore")

    runtime._session = Broken()
    with pytest.raises(ModelError, match=r"failed on tiles of shape \(1, 32, 32, 3\): out of memory\nTry"):
        runtime.scores(block(40, 40), np.array([(0, 0)]))


def test_weights_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    model = graph(Tiny())
    model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20, 3, 3]
    with pytest.raises(IntegrityError, match="w1 announces"):
        Runtime(saved(tmp_path, model))


def test_a_graph_that_asks_for_more_memory_than_there_is(tmp_path: Path) -> None:
    model = graph(Tiny())
    shape = onnx.numpy_helper.from_array(np.array([1 << 22, 1 << 22], np.int64), "vast")
    model.graph.initializer.append(shape)
    node = next(n for n in model.graph.node if n.op_type == "Identity")
    node.op_type, node.input[:] = "Add", ["pooled", "sum"]
    at = list(model.graph.node).index(node)
    made = [
        onnx.helper.make_node("ConstantOfShape", ["vast"], ["zeros"]),
        onnx.helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
    ]
    nodes = [*model.graph.node[:at], *made, *model.graph.node[at:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(CardError, match="ONNX Runtime"):
        Runtime(saved(tmp_path, model))


def test_slides_of_one_process_share_a_session(tmp_path: Path) -> None:
    card = tiny(tmp_path / "a")
    first = shared_runtime(card, device="cpu")
    assert shared_runtime(load_card(tmp_path / "a" / "card.json"), device="cpu") is first
    assert shared_runtime(card, device="cpu", batch_size=3, batched=True) is not first
    (tmp_path / "a" / "tiny.onnx").write_bytes(b"something else")
    with pytest.raises(IntegrityError):
        shared_runtime(card, device="cpu")
