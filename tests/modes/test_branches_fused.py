"""Branches beside fused, split, shared and repeated weights, with and without biases of lora_B."""

import numpy as np
import pytest
from branch_cases import BIAS, IN, OUT, X3, W, conv_base, linear_base, one, relu
from branch_graphs import (
    check_swap,
    conv_lora,
    convolve,
    effective,
    lora,
    magnitude,
)
from small_graphs import adapter, graph, random, save


@pytest.mark.parametrize("pack", [False, True], ids=["single", "pack"])
@pytest.mark.parametrize("changed", ["q", "q v", "q k v", "qkv"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_biases_of_fused_and_split_modules(fused, changed, pack, tmp_path):
    """``lora_bias`` of parts of a fused weight, or of a whole that the exporter split."""
    spans = PARTS["qkv"] | {"qkv": (0, 32)}
    weight, own = random(32, IN, seed=7) / 5, random(32, seed=8)
    if fused:
        text = one("z = MatMul (x, a_qkv_proj_weight) y = Add (z, a_qkv_proj_bias)", X3)
        weights = {"a.qkv_proj.weight": weight.T.copy(), "a.qkv_proj.bias": own}
    else:
        lines = (
            f"z{n} = MatMul (x, a_{n}_proj_weight) {n} = Add (z{n}, a_{n}_proj_bias)" for n in PARTS["qkv"]
        )
        text = one(f"{' '.join(lines)} y = Concat <axis = -1> (q, k, v)", X3)
        weights = {f"a.{n}_proj.weight": weight[slice(*rows)].T.copy() for n, rows in PARTS["qkv"].items()}
        weights |= {f"a.{n}_proj.bias": own[slice(*rows)] for n, rows in PARTS["qkv"].items()}
    base = save(graph(text, weights), tmp_path)

    def made(seed):
        modules = []
        for number, name in enumerate(changed.split()):
            height = spans[name][1] - spans[name][0]
            bias = random(height, seed=seed + number)
            modules.append(lora(f"a.{name}_proj", height, IN, seed, seed + 9 * number, lora_bias=bias))
        return adapter(*modules)

    def answer(modules):
        full, bias = weight.astype(np.float64), own.astype(np.float64)
        for name, span in spans.items():
            module = modules.get(f"a.{name}_proj")
            full[slice(*span)] = effective(full[slice(*span)], module)
            bias[slice(*span)] += module.scaling * module.lora_bias.astype(np.float64) if module else 0
        return [X3.astype(np.float64) @ full.T + bias]

    check_swap(base, made(2), answer, {"x": X3}, made(3), pack=pack)


@pytest.mark.parametrize("case", ["gemm", "conv", "conv-relu"])
def test_biases_of_other_operators(case, tmp_path):
    bias = random(OUT, seed=3)
    if case == "gemm":
        base, weight, feeds = linear_base("gemm", tmp_path)
        given = adapter(lora("fc", OUT, IN, lora_bias=bias))

        def answer(modules):
            more = sum(m.scaling * m.lora_bias.astype(np.float64) for m in modules.values())
            return [feeds["x"].astype(np.float64) @ effective(weight, modules.get("fc")).T + BIAS + more]
    else:
        behind = "y = Relu (z)" if case == "conv-relu" else None
        base, weight, own, x = conv_base(tmp_path, 8, OUT, (3, 3), "pads = [1, 1, 1, 1]", behind=behind)
        given, feeds = adapter(conv_lora("c", OUT, 8, 3, 3, lora_bias=bias)), {"x": x}

        def answer(modules):
            more = sum(m.scaling * m.lora_bias.astype(np.float64) for m in modules.values())
            y = convolve(x, effective(weight, modules.get("c")), own + more, padding=1)
            return [relu(y) if behind else y]

    check_swap(base, given, answer, feeds)


PARTS = {"qkv": {"q": (0, 16), "k": (16, 24), "v": (24, 32)}, "gate_up": {"gate": (0, 12), "up": (12, 24)}}


FUSED_OPS = {
    "matmul": "z = MatMul (x, a_{0}_proj_weight) y = Tanh (z)",
    "gemm": "f = Reshape (x, flat) z = Gemm <alpha = 0.5> (f, a_{0}_proj_weight, a_{0}_proj_bias) "
    "t = Tanh (z) y = Reshape (t, deep)",
}


def fused_base(folder, fused, operator):
    spans = PARTS[fused]
    height = max(stop for _, stop in spans.values())
    weight = random(height, IN, seed=7) / 5
    weights = {f"a.{fused}_proj.weight": weight.T.copy()}
    bias, factor = 0, 1.0
    if operator == "gemm":
        bias, factor = random(height, seed=8), 0.5
        shapes = {"flat": np.array([-1, IN]), "deep": np.array([2, 3, height])}
        weights |= {f"a.{fused}_proj.bias": bias} | shapes
    base = save(graph(one(FUSED_OPS[operator].format(fused), X3), weights), folder)

    def answer(modules):
        full = weight.astype(np.float64)
        for name, (start, stop) in spans.items():
            full[start:stop] = effective(weight[start:stop], modules.get(f"a.{name}_proj"))
        return [np.tanh(factor * (X3.astype(np.float64) @ full.T) + bias)]

    return base, answer


@pytest.mark.parametrize("operator", FUSED_OPS)
@pytest.mark.parametrize("kind", ["plain", "pack", "dora", "dora-pack"])
@pytest.mark.parametrize("changed", ["q k v", "q v", "k", "v k q", "q k", "gate up", "up"])
def test_parts_of_a_fused_weight(changed, kind, operator, tmp_path):
    """Some parts or all, in any order; what no adapter changes keeps its bits in every run."""
    names = changed.split()
    fused = "gate_up" if names[-1] == "up" else "qkv"
    base, answer = fused_base(tmp_path, fused, operator)

    def made(seed, dora=False, which=names):
        modules = []
        for number, name in enumerate(which):
            start, stop = PARTS[fused][name]
            more = {"magnitude": magnitude(stop - start)} if dora else {}
            modules.append(lora(f"a.{name}_proj", stop - start, IN, 1 + number + seed, seed + number, **more))
        return adapter(*modules)

    dora = kind.startswith("dora")
    others = [made(3), made(5, dora, names[:1])]
    report = check_swap(
        base, made(1, dora), answer, {"x": X3}, *others, pack=kind.endswith("pack"), dora=dora
    )
    packed = kind.endswith("pack") and len(names) > 1
    assert len(report.exposed.modules) == (1 if packed else len(names))


@pytest.mark.parametrize("kind", ["plain", "pack", "dora"])
@pytest.mark.parametrize(("whole", "parts"), [("gate_up", ("gate", "up")), ("qkv", ("q", "k", "v"))])
def test_a_module_that_the_exporter_split(whole, parts, kind, tmp_path):
    rows = {"gate": 12, "up": 12, "q": 16, "k": 8, "v": 8}
    weights = {part: random(rows[part], IN, seed=ord(part[0])) for part in parts}
    outputs = ", ".join(f"float[a,b,{part}s] {part}" for part in parts)
    lines = " ".join(f"{part} = MatMul (x, a_{part}_proj_weight)" for part in parts)
    model = graph(one(lines, X3, outputs), {f"a.{p}_proj.weight": w.T.copy() for p, w in weights.items()})
    base = save(model, tmp_path)
    path, full = f"a.{whole}_proj", np.concatenate(list(weights.values()))
    ends = np.cumsum([rows[part] for part in parts])[:-1]

    def answer(modules):
        y = X3.astype(np.float64) @ effective(full, modules.get(path)).T
        return np.split(y, ends, axis=-1)

    more = {"magnitude": magnitude(len(full))} if kind == "dora" else {}
    given, other = (adapter(lora(path, len(full), IN, rank, **more)) for rank in (2, 4))
    check_swap(base, given, answer, {"x": X3}, other, dora=kind == "dora", pack=kind == "pack")


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_a_split_module_whose_parts_read_two_values(dora, tmp_path):
    """The query and the key read one copy of the activation, the value another: one product for each."""
    weights = {f"a.{name}_proj.weight": random(IN, OUT, seed=ord(name)) for name in "qkv"}
    lines = "q = MatMul (x, a_q_proj_weight) k = MatMul (x, a_k_proj_weight) v = MatMul (x2, a_v_proj_weight)"
    text = one(f"x2 = Tanh (x) {lines}", X3, ", ".join(f"float[a,b,n] {name}" for name in "qkv"))
    base = save(graph(text, weights), tmp_path)
    full = np.concatenate([weight.T for weight in weights.values()])

    def answer(modules):
        changed = effective(full, modules.get("a.qkv_proj"))
        x = X3.astype(np.float64)
        return [
            (np.tanh(x) if part == 2 else x) @ changed[part * OUT : (part + 1) * OUT].T for part in range(3)
        ]

    more = {"magnitude": magnitude(3 * OUT)} if dora else {}
    check_swap(base, adapter(lora("a.qkv_proj", 3 * OUT, IN, **more)), answer, {"x": X3}, dora=dora)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_siblings_packed(kind, tmp_path):
    """Separate q, k, v of several widths in one pair of tensors; an adapter may leave some of them alone."""
    rows = {"q": 16, "k": 8, "v": 8}
    weights = {name: random(rows[name], IN, seed=ord(name)) for name in rows}
    lines = " ".join(f"{name} = MatMul (x, a_{name}_proj_weight)" for name in rows)
    outputs = ", ".join(f"float[a,b,{name}s] {name}" for name in rows)
    model = graph(one(lines, X3, outputs), {f"a.{n}_proj.weight": w.T.copy() for n, w in weights.items()})

    def answer(modules):
        x = X3.astype(np.float64)
        return [x @ effective(w, modules.get(f"a.{n}_proj")).T for n, w in weights.items()]

    def made(names, rank):
        more = {n: {"magnitude": magnitude(rows[n])} if kind == "dora" else {} for n in names}
        return adapter(
            *(lora(f"a.{n}_proj", rows[n], IN, rank + i, i, **more[n]) for i, n in enumerate(names))
        )

    base = save(model, tmp_path)
    report = check_swap(
        base, made("vqk", 2), answer, {"x": X3}, made("qkv", 1), made("k", 3), pack=True, dora=kind == "dora"
    )
    (module,) = report.exposed.modules
    assert [member.path for member in module.members] == ["a.q_proj", "a.k_proj", "a.v_proj"]


def two_calls(folder, other_x, scopes, second="fc_weight", **weights):
    x2 = "u" if other_x else "x"
    text = one(
        f"u = Tanh (x) [n1] y = MatMul (x, fc_weight) [n2] z = MatMul ({x2}, {second})",
        X3,
        "float[a,b,n] y, float[a,b,n] z",
    )
    return save(
        graph(text, {"fc.weight": W.T.copy(), **weights}, dict(zip(("n1", "n2"), scopes, strict=True))),
        folder,
    )


def two_answers(other_x, paths):
    def answer(modules):
        x = X3.astype(np.float64)
        first, second = (effective(W, modules.get(path)).T for path in paths)
        return [x @ first, (np.tanh(x) if other_x else x) @ second]

    return answer


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("other_x", [False, True], ids=["same-x", "other-x"])
@pytest.mark.parametrize("repeated", [False, True], ids=["one-constant", "two-constants"])
def test_a_module_called_twice(other_x, repeated, dora, tmp_path):
    more = {"second": "copy", "copy": W.T.copy()} if repeated else {}
    base = two_calls(tmp_path, other_x, ("fc", "fc"), **more)
    scale = {"magnitude": magnitude(OUT)} if dora else {}
    given, other = (adapter(lora("fc", OUT, IN, rank, **scale)) for rank in (2, 3))
    check_swap(base, given, two_answers(other_x, ("fc", "fc")), {"x": X3}, other, dora=dora)


@pytest.mark.parametrize("paths", [("one",), ("two",), ("one", "two")], ids="-".join)
def test_equal_weights_of_two_modules(paths, tmp_path):
    """The exporter merged them; a branch goes beside the module that the adapter changes, and no other."""
    base = two_calls(tmp_path, False, ("one", "two"))
    given = adapter(*(lora(path, OUT, IN, seed=len(path) + i) for i, path in enumerate(paths)))
    for pack in (False, True):
        check_swap(base, given, two_answers(False, ("one", "two")), {"x": X3}, pack=pack)
