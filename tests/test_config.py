"""TOML in, dataclasses out: what is accepted comes back the same, and what is not is named in one line."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import VARIANTS, Table

from lamina import toml
from lamina.config import Experiment, experiment, load_experiment, load_pretrain
from lamina.data import TASKS
from lamina.data.shakespeare import Shakespeare
from lamina.errors import UserError, nearest
from lamina.fleet import DeviceClass
from lamina.job import Local
from lamina.methods import METHODS
from lamina.methods.blocks import Caff
from lamina.methods.lora import FedLora

MINIMAL: Table = {
    "name": "mine",
    "rounds": 2,
    "cohort": 1,
    "networks": ["net"],
    "fleet": [{"name": "weak", "memory": "8 MiB"}, {"name": "strong"}],
}
TEXT = """
name = "mine"
rounds = 2
cohort = 1
networks = ["net"]

[task]
name = "shakespeare"
window = 16
scored = 4

[method]
name = "caff"

[local]
lr = 0.1

[[fleet]]
name = "weak"
memory = "8 MiB"

[[fleet]]
name = "strong"
share = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """What is said about a file that is not accepted: one line."""
    with pytest.raises(UserError) as caught:
        load_experiment(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_gives_what_it_says_and_every_default(file: Path) -> None:
    assert load_experiment(file) == Experiment(
        name="mine",
        rounds=2,
        cohort=1,
        networks=("net",),
        seed=0,
        eval_every=0,
        eval_devices=0,
        validation=0.0,
        clip_updates=0.0,
        workers=0,
        task=Shakespeare(window=16, scored=4),
        method=Caff(),
        local=Local(lr=0.1),
        fleet=(DeviceClass("weak", memory="8 MiB"), DeviceClass("strong", share=3.0)),
    )


def test_tables_may_be_left_out() -> None:
    made = experiment(MINIMAL | {"local": {"lr": 1e-3}}, "here")
    assert (made.task, made.method, made.local) == (Shakespeare(), Caff(), Local(lr=1e-3))


@pytest.mark.parametrize("method", VARIANTS.values(), ids=list(VARIANTS))
def test_every_method_survives_toml(method: Any) -> None:
    made = replace(experiment(MINIMAL | {"local": {"lr": 1.0}}, "here"), method=method)
    assert experiment(tomllib.loads(toml.dump(made.to_table())), "there") == made


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0\x7f"), min_size=1, max_size=8
).filter(lambda name: name not in (".", ".."))
counts = st.integers(1, 10**12)
floats = st.floats(1e-30, 1e30, allow_nan=False)
sizes = st.one_of(st.none(), counts, st.builds("{} {}".format, counts, st.sampled_from(["B", "kB", "MiB"])))
operations = st.one_of(st.none(), counts, st.builds("{} {}".format, counts, st.sampled_from(["", "GFLOP"])))
experiments = st.builds(
    Experiment,
    name=names,
    rounds=counts,
    cohort=counts,
    networks=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")), min_size=1).map(
        tuple
    ),
    seed=st.integers(0, 2**62),
    eval_every=st.integers(0, 9),
    eval_devices=st.integers(0, 9),
    validation=st.sampled_from([0.0, 0.2]),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    workers=st.integers(0, 9),
    task=st.builds(Shakespeare, path=st.none() | names, devices=st.none() | counts, alpha=floats),
    method=st.sampled_from(list(VARIANTS.values())),
    local=st.builds(Local, lr=floats, weight_decay=floats, batch_size=st.integers(1, 10**6), steps=st.integers(0, 99)),
    fleet=st.lists(
        st.builds(DeviceClass, names, floats, sizes, sizes, sizes, operations),
        min_size=1,
        max_size=4,
        unique_by=lambda each: each.name,
    ).map(tuple),
)


@given(experiments)
def test_what_is_dumped_is_loaded_the_same(made: Experiment) -> None:
    text = toml.dump(made.to_table())
    assert experiment(tomllib.loads(text), "there") == made
    assert toml.dump(experiment(tomllib.loads(text), "there").to_table()) == text


def test_a_delete_character_is_dumped_too() -> None:
    tomllib.loads(toml.dump({"name": "a\x7f"}))


TOP = (
    "name, rounds, cohort, networks, seed, eval_every, eval_devices, validation, clip_updates, workers, levers, "
    "enforce, engine, device, precision, prefix_ram, prefix_disk, track, prefer, task, method, local, fleet, clock"
)
METHOD_NAMES = ", ".join(METHODS)
FLEET_KEYS = "name, share, memory, uplink, downlink, flops, speed, up_rate, down_rate, devices, drift"
CLOCK_KEYS = "deadline, over_selection, min_updates, availability, available_hours, failures"
RATE, SPEED = (f"must be a rate above 0, such as {each}" for each in ('"4 Mbit/s" or "1 MB/s"', '"20 GFLOP/s"'))
TIMELESS = (
    "clock.deadline, clock.over_selection and clock.availability need devices that take time: give classes speed, "
    'up_rate or down_rate, or take fleet = "traces"'
)
QUANTITY = 'must be a quantity above 0, such as 64000000 or "61 MiB"'


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=3", f": unknown key 'round'; did you mean 'rounds'? accepted: {TOP}"),
        ("qqq=3", f": unknown key 'qqq'; accepted: {TOP}"),
        (
            "local.learning=3",
            ": [local]: unknown key 'learning'; accepted: lr, head_lr, optimizer, schedule, momentum, weight_decay, "
            "batch_size, steps, epochs, clip",
        ),
        (
            "task.windows=3",
            ": [task] shakespeare: unknown key 'windows'; did you mean 'window'? accepted: path, split, devices, "
            "alpha, window, stride, scored, train_fraction, min_windows, test_windows",
        ),
        (
            "method.abesnt='keep'",
            ": [method] caff: unknown key 'abesnt'; did you mean 'absent'? accepted: absent, on_infeasible, weighting, "
            "fallback, directions, zeroth_lr, train_head, train_embeddings",
        ),
        ("fleet.weak.memroy=3", f": [[fleet]] 1: unknown key 'memroy'; did you mean 'memory'? accepted: {FLEET_KEYS}"),
        ("method.name='caf'", f": [method]: unknown name 'caf'; did you mean 'caff'? accepted: {METHOD_NAMES}"),
        ("method.name=3", f": [method]: unknown name 3; accepted: {METHOD_NAMES}"),
        (
            "task.name='shakespear'",
            ": [task]: unknown name 'shakespear'; did you mean 'shakespeare'? accepted: " + ", ".join(TASKS),
        ),
        ("fleet.weak.memory=0", f": [[fleet]] 1: memory {QUANTITY}; got 0"),
        ("fleet.strong.uplink='-1 MiB'", f": [[fleet]] 2: uplink {QUANTITY}; got '-1 MiB'"),
        ("fleet.strong.downlink='2 Mib/s'", f": [[fleet]] 2: downlink {QUANTITY}; got '2 Mib/s'"),
        (
            "fleet.strong.flops='1.2.3 G'",
            ": [[fleet]] 2: flops must be a quantity above 0, such as 64000000 or \"20 GFLOP\"; got '1.2.3 G'",
        ),
        ("fleet.strong.share=0", ": [[fleet]] 2: share must be above 0 and at most 1e+30, got 0.0"),
        ("fleet.strong.share=1e308", ": [[fleet]] 2: share must be above 0 and at most 1e+30, got 1e+308"),
        (
            "local.batch_size=100000000000000",
            ": [local]: batch_size times steps must be at most 100000000, got 100000000000000",
        ),
        (
            f"local.steps={10**20}",
            f": [local]: batch_size times steps must be at most 100000000, got {32 * 10**20}",
        ),
        (f"local.epochs={10**20}", f": [local]: epochs must be at most 1000000, got {10**20}"),
        ("local.lr=nan", ": [local]: lr = nan is not accepted: Input should be a finite number"),
        ("local.lr=inf", ": [local]: lr = inf is not accepted: Input should be a finite number"),
        ("local.lr=-1", ": [local]: lr must be above 0, got -1.0"),
        ("local.lr='fast'", ": [local]: lr = 'fast' is not accepted: Input should be a valid number"),
        (
            "local.optimizer='adam'",
            ": [local]: optimizer = 'adam' is not accepted: Input should be 'sgd', 'adamw', 'adamw8' or 'adafactor'",
        ),
        ("rounds=1.5", ": rounds = 1.5 is not accepted: Input should be a valid integer"),
        ("rounds='2'", ": rounds = '2' is not accepted: Input should be a valid integer"),
        ("rounds=true", ": rounds = True is not accepted: Input should be a valid integer"),
        ("rounds=0", ": rounds must be at least 1, got 0"),
        ("cohort=0", ": cohort must be at least 1, got 0"),
        ("seed=-1", ": seed must not be negative, got -1"),
        ("workers=-1", ": workers must not be negative, got -1"),
        ("networks='net'", ": networks = 'net' is not accepted: Input should be a valid array"),
        ("networks=[]", ": networks must name at least one network"),
        ("name='a/b'", ": name must be a plain file name, got 'a/b'"),
        ("name=''", ": name must be a plain file name, got ''"),
        ("name='.'", ": name must be a plain file name, got '.'"),
        ("name='..'", ": name must be a plain file name, got '..'"),
        (f"name='{67 * '長'}'", ": name must have at most 200 bytes, as folders get it; got 201"),
        ("method.train_head=1", ": [method] caff: train_head = 1 is not accepted: Input should be a valid boolean"),
        ("local=3", ": [local] must be a table, got 3"),
        ("fleet=3", ': fleet must be written as [[fleet]] tables, one per device class, or be "traces"'),
        ("fleet=trace", ': fleet must be written as [[fleet]] tables, one per device class, or be "traces"'),
        ("fleet={classes=3}", ': fleet must be written as [[fleet]] tables, one per device class, or be "traces"'),
        (
            "fleet={name='traces', class=3}",
            ": [fleet] traces: unknown key 'class'; did you mean 'classes'? accepted: memory_share, classes, speed, "
            "since, drift",
        ),
        (
            "fleet={name='traces', since=2030}",
            ": [fleet] traces: since must be at most 2019, the year of the latest phones; got 2030",
        ),
        ("fleet={name='traces', classes=0}", ": [fleet] traces: classes must be at least 1, got 0"),
        (
            "fleet={name='traces', memory_share=0}",
            ": [fleet] traces: memory_share must be above 0 and at most 1, got 0.0",
        ),
        ("fleet={name='traces', speed='2 GB/s'}", f": [fleet] traces: speed {SPEED}; got '2 GB/s'"),
        ("fleet.weak.speed='2 GFLOP'", f": [[fleet]] 1: speed {SPEED}; got '2 GFLOP'"),
        ("fleet.weak.up_rate='4 Mbps'", f": [[fleet]] 1: up_rate {RATE}; got '4 Mbps'"),
        ("fleet.weak.up_rate=4000", ": [[fleet]] 1: up_rate = 4000 is not accepted: Input should be a valid string"),
        ("clock.dedline=3", f": [clock]: unknown key 'dedline'; did you mean 'deadline'? accepted: {CLOCK_KEYS}"),
        ("clock.deadline=-1", ": [clock]: deadline must be finite and not negative, got -1.0"),
        ("clock.over_selection=0.9", ": [clock]: over_selection must be from 1 to 100, got 0.9"),
        ("clock.min_updates=0", ": [clock]: min_updates must be at least 1, got 0"),
        ("clock.available_hours=0", ": [clock]: available_hours must be above 0 and at most 24, got 0.0"),
        ("clock.min_updates=9", ": clock.min_updates = 9 is more than the cohort of 1"),
        ("clock.deadline=3", f": {TIMELESS}"),
        ("clock.over_selection=1.3", f": {TIMELESS}"),
        ("clock.availability=diurnal", f": {TIMELESS}"),
        ("engine=stacked", ": engine = 'stacked' is not accepted: Input should be 'auto' or 'serial'"),
        ("validation=1", ": validation must be at least 0 and less than 1, got 1.0"),
        ("clip_updates=-1", ": clip_updates must be finite and not negative, got -1.0"),
        ("prefix_ram=-1", ': prefix_ram must be a quantity above 0, such as 64000000 or "61 MiB"; got -1'),
        ("fleet=[3]", ": [[fleet]] 1 must be a table, got 3"),
        ("fleet=[]", ": [[fleet]] needs at least one class, each with a name of its own; got []"),
        (
            "fleet.weak.name='strong'",
            ": [[fleet]] needs at least one class, each with a name of its own; got ['strong', 'strong']",
        ),
        ("fleet=[{share=1}]", ": [[fleet]] 1: name is missing"),
        ("method=3", ": [method] must be a table, got 3"),
    ],
)
def test_refusals_name_the_key_and_what_is_accepted(override: str, message: str, file: Path) -> None:
    assert refusal(file, override) == f"{file}{message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.window=1", "task.window must be at least 2, got 1"),
        ("task.alpha=0.0", "task.alpha must be finite and above 0, got 0.0"),
        ("rounds", "--set takes key=value, such as local.lr=0.001; got 'rounds'"),
        ("=3", "--set takes key=value, such as local.lr=0.001; got '=3'"),
        (
            "fleet.weka.memory=3",
            "--set fleet.weka.memory=3: fleet has no 'weka'; did you mean 'weak'? accepted: weak, strong",
        ),
        ("fleet.weak=3", "--set fleet.weak=3: fleet is not a table"),
        ("name.x=3", "--set name.x=3: name is not a table"),
    ],
)
def test_refusals_of_settings(override: str, message: str, file: Path) -> None:
    assert refusal(file, override) == message


@pytest.mark.parametrize(
    "override",
    [
        "name.x.y=3",
        "fleet=[3]\0fleet.weak.memory=3",
        "fleet=[{share=1.0}]\0fleet.weak.memory=3",
        "task.name=['shakespeare']",
        "fleet.weak.memory='1e999'",
    ],
)
def test_odd_settings_are_refused_in_one_line_too(override: str, file: Path) -> None:
    assert refusal(file, *override.split("\0"))


def test_what_is_missing_is_named(file: Path) -> None:
    for key in ("name", "rounds", "cohort", "networks"):
        left = {k: v for k, v in MINIMAL.items() if k != key} | {"local": {"lr": 1.0}}
        with pytest.raises(UserError, match=f"^here: {key} is missing$"):
            experiment(left, "here")
    assert experiment(MINIMAL, "here").local == Local()
    with pytest.raises(UserError, match=r"^here: \[\[fleet\]\] needs at least one class"):
        experiment({k: v for k, v in MINIMAL.items() if k != "fleet"} | {"local": {"lr": 1.0}}, "here")
    assert experiment(MINIMAL | {"method": {"absent": "skip"}}, "here").method == METHODS["caff"](absent="skip")


def test_a_missing_file_is_named_with_the_nearest(file: Path) -> None:
    assert refusal(file.with_name("nime.toml")) == f"{file.with_name('nime.toml')} is not a file; did you mean {file}?"
    assert refusal(file.with_name("x")) == f"{file.with_name('x')} is not a file"
    assert refusal(file.parent) == f"{file.parent} is not a file"
    assert refusal(Path("no/such/folder.toml")) == f"{Path('no/such/folder.toml')} is not a file"


@pytest.mark.parametrize("content", [b"rounds = ", b"rounds = 1\nrounds = 2", b"[task\n", b"name = '\xff'"], ids=repr)
def test_bad_toml_is_named(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert refusal(file).startswith(f"{file} is not valid TOML: ")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("local.lr=0.5", ("local", "lr"), 0.5),
        ("local.lr = 1e-2", ("local", "lr"), 0.01),
        ("local.lr=2", ("local", "lr"), 2.0),
        ("seed=7", ("seed",), 7),
        ("name = other", ("name",), "other"),
        ("name='other'", ("name",), "other"),
        ("task.path=a=b.json", ("task", "path"), "a=b.json"),
        ('networks=["a", "b"]', ("networks",), ("a", "b")),
        ("method.absent=skip", ("method", "absent"), "skip"),
        ("method.train_head=false", ("method", "train_head"), False),
        ("fleet.weak.memory=48 MiB", ("fleet", 0, "memory"), "48 MiB"),
        ('fleet.weak.memory="48 MiB"', ("fleet", 0, "memory"), "48 MiB"),
        ("fleet.strong.memory=64000000", ("fleet", 1, "memory"), 64000000),
    ],
)
def test_overrides(override: str, path: tuple[Any, ...], value: object, file: Path) -> None:
    made: Any = load_experiment(file, [override])
    for step in path:
        made = made[step] if isinstance(step, int) else getattr(made, step)
    assert made == value
    assert type(made) is type(value)


def test_overrides_make_tables_and_the_last_one_wins(file: Path) -> None:
    file.write_text(TEXT.replace("[local]\nlr = 0.1\n", ""), encoding="utf-8")
    assert load_experiment(file, ["local.lr=0.5", "local.lr=0.25"]).local == Local(lr=0.25)
    method = load_experiment(file, ["local.lr=1", "method.name=lora", "method.depth=2"]).method
    assert method == FedLora(depth=2)


def test_the_order_of_fleet_classes_is_kept(file: Path) -> None:
    fleet = load_experiment(file).fleet
    assert isinstance(fleet, tuple)
    assert [each.name for each in fleet] == ["weak", "strong"]


def test_pretraining_files_are_read_as_strictly(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.toml"
    path.write_text('text = "t.txt"\nout = "o"\nname = "n"\nsteps = [1]\nlr = [0.1]\ndepths = [1]\n', encoding="utf-8")
    job = load_pretrain(path)
    assert (job.steps, job.lr, job.depths) == ((1,), (0.1,), (1,))
    assert load_pretrain(path, ["embed=24"]).embed == 24
    with pytest.raises(UserError, match=re.escape(f"{path}: unknown key 'embedd'; did you mean 'embed'?")):
        load_pretrain(path, ["embedd=24"])
    with pytest.raises(UserError, match="is not accepted: Input should be a finite number"):
        load_pretrain(path, ["lr=[nan]"])


def test_a_dump_leaves_out_none_and_keeps_order() -> None:
    table = {"b": 1, "none": None, "a": [1, "x"], "t": {"s": 'quo"te', "none": None}, "f": [{"n": 1.5}, {"n": True}]}
    assert toml.dump(table) == 'b = 1\na = [1, "x"]\n\n[t]\ns = "quo\\"te"\n\n[[f]]\nn = 1.5\n\n[[f]]\nn = true\n'


def test_json_numbers_are_toml_numbers() -> None:
    values = [1e-300, 1e300, 0.1, -0.0, 1e16, 123456789012345678]
    assert tomllib.loads(toml.dump({"v": values}))["v"] == values
    assert json.dumps(1e16) == "1e+16"


def test_nearest() -> None:
    assert nearest("caf", METHODS) == f"did you mean 'caff'? accepted: {METHOD_NAMES}"
    assert nearest("zzz", ["a", "b"]) == "accepted: a, b"


@pytest.mark.parametrize("slow", ["engine=serial", "enforce=true"])
def test_devices_compute_in_full_precision(slow: str, file: Path) -> None:
    assert refusal(file, slow, "precision=bfloat16") == (
        f"{file}: precision = 'bfloat16' goes with engine = \"auto\", without enforce"
    )
    assert load_experiment(file, ["prefix_ram=0", "prefix_disk=0", "precision=bfloat16"]).prefix_ram == 0
