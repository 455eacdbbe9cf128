"""Bills in TensorBoard, read back by TensorBoard's own reader, and what the command does with --logdir."""

import io
import json
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import bf16
from compiled import bill as compiled_bill
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stepbill.experiments import bill as command
from stepbill.experiments import demo, flags
from stepbill.model.scopes import scope
from stepbill.profiling import plots, render, tensorboard, trace
from stepbill.profiling.bill import GROUPS, Bill, Row, Work
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.plots import UNATTRIBUTED
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams import metadata

TINY = ("--num_layers=2", "--width=64", "--heads=4", "--kv_heads=2", "--mlp_width=128", "--context=32")


def two_products(x, w, v):
    with scope("attention/qkv"):
        y = x @ w
    with scope("mlp/up"):
        return (y @ v).astype("float32")


@cache
def a_bill(target: str = "h200", batch: int = 64) -> str:
    """JSON of a bill with a price, of a program that fits no kernel of another component."""
    made = compiled_bill(target, two_products, bf16(batch, 256), bf16(256, 512), bf16(512, 128))
    made.program |= {"model": "tiny", "step": "prefill", "batch": batch, "context": 4, "target": target, "chips": 1}
    made.program |= {"weights": "bf16", "mesh": {}, "flags": {"batch": str(batch)}}
    if made.total.picoseconds:
        made.price = {"dollars_per_million_tokens": 0.25, "tokens_per_second": 1e6, "chip_dollars_per_hour": 3.5}
    return made.dumps()


def read(text: str) -> Bill:
    return Bill.from_json(json.loads(text))


def measured(bill: Bill) -> Bill:
    """With a measured time of three times the roofline."""
    for work in (bill.total, bill.unattributed, *(row.work for row in bill.rows)):
        work.measured_picoseconds = 3 * work.picoseconds
    spent = trace.Spent({"fusion": bill.total.measured_picoseconds}, bill.total.measured_picoseconds, 10**12, 0, ())
    execution = trace.Execution("gpu:0", (), frozenset())
    execution.__dict__["spent"] = spent  # instead of one swept from events
    bill.measured = trace.facts(bill, [execution], CHIPS["h200"], {"untraced_seconds": [bill.total.seconds * 4]})
    return bill


def shown(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()


def scalars(folder: Path) -> dict[str, float]:
    """The last value of each tag."""
    events = shown(folder)
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


# --- what is written -----------------------------------------------------------------------------------------------


def test_scalars_are_the_bills_own_numbers(tmp_path):
    bill = measured(read(a_bill()))
    (folder,) = tensorboard.write(tmp_path, [tensorboard.Run(bill)])
    found = scalars(folder)

    def of(work: Work) -> dict[str, float]:
        return {
            "matmul_flops": work.matmul,
            "other_flops": work.elementwise + work.transcendental,
            "hbm_bytes": work.hbm_bytes,
            "link_bytes": work.link_bytes,
            "roofline_seconds": work.picoseconds * 1e-12,
            "predicted_seconds": work.predicted_picoseconds * 1e-12,
            "measured_seconds": work.measured_picoseconds * 1e-12,
            "dollars_per_million_tokens": 0.25 * work.picoseconds / bill.total.picoseconds,
        }

    expected = {f"{what}/unattributed": amount for what, amount in of(bill.unattributed).items()}
    names = {row.component for row in bill.rows}
    assert {"attention/qkv", "mlp/up"} <= names
    for name in names:
        work = sum((row.work for row in bill.rows if row.component == name), Work())
        expected |= {f"{what}/{name}": amount for what, amount in of(work).items() if amount}
        for side in ("hbm_read", "hbm_write"):
            moved = getattr(work, side).items()
            expected |= {f"{side}_bytes/{name}/{role}": amount for role, amount in moved if amount}
    for name in GROUPS:
        expected |= {f"group_{name}/{what}": amount for what, amount in of(bill.group(name)).items() if amount}
    for tax in {row.tax for row in bill.rows if row.tax}:
        expected |= {f"tax_{tax}/{what}": amount for what, amount in of(bill.tax(tax)).items() if amount}
    assert bill.measured and bill.predicted
    expected |= {
        **{f"bill/{name}": bill.measured[name] for name in ("mfu", "mbu")},
        "bill/predicted_seconds": bill.total.predicted_picoseconds * 1e-12,
        "bill/hbm_bytes": bill.total.hbm_bytes,
        "bill/matmul_flops": bill.total.matmul,
        "bill/roofline_seconds": bill.total.seconds,
        "bill/measured_seconds": bill.total.seconds * 4,
        "bill/measured_busy_seconds": bill.total.seconds * 3,
        "bill/measured_coverage": 1.0,
        "bill/tokens_per_second": 1e6,
        "bill/dollars_per_million_tokens": 0.25,
        "bill/peak_memory_bytes": bill.memory["peak_bytes"],
        "bill/hbm_bytes_over_ideal": bill.efficiency or 0.0,
    }
    assert found == {tag: float(np.float32(amount)) for tag, amount in expected.items()}


def test_what_nobody_knows_is_not_shown(tmp_path):
    (folder,) = tensorboard.write(tmp_path, [tensorboard.Run(read(a_bill("host")))])
    assert "bill/hbm_bytes" in scalars(folder)
    assert not [tag for tag in scalars(folder) if "seconds" in tag or "dollars" in tag]
    assert set(shown(folder).Tags()["images"]) == {"bill/bytes", "bill/flops"}


def test_a_prediction_is_shown_beside_the_measurement():
    bill = measured(read(a_bill()))
    axes = plots.figures(bill)["measured"].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["measured", "predicted"]
    for name in ("attention/qkv", "mlp/up"):
        row = bill.component(name)
        ratio = f"{row.measured_picoseconds / row.predicted_picoseconds:.2f}x"
        assert sum(text.get_text().endswith(f" {ratio}") for text in axes.texts) >= 1
    assert axes.get_xlabel() == "seconds, per step; x: measured over predicted"
    bill.predicted = None
    axes = plots.figures(bill)["measured"].axes[0]
    assert axes.get_xlabel() == "seconds, per step; x: measured over roofline"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["measured", "roofline"]
    assert sum(text.get_text().endswith(" 3.00x") for text in axes.texts) == len(plots.bars(bill)) - 1


def test_the_same_bill_again_is_the_next_step(tmp_path):
    tensorboard.write(tmp_path, [tensorboard.Run(read(a_bill()))])
    (folder,) = tensorboard.write(tmp_path, [tensorboard.Run(read(a_bill()))])
    events = shown(folder)
    assert [event.step for event in events.Scalars("bill/hbm_bytes")] == [0, 1]
    assert [event.step for event in events.Images("bill/bytes")] == [0, 1]
    assert [event.step for event in events.Tensors("bill/text_summary")] == [0, 1]


def test_hyperparameters_of_a_sweep(tmp_path):
    bills = [read(a_bill(batch=batch)) for batch in (64, 128)]
    bills[1].program["flags"] |= {"weights": "int8", "format": "json"}
    bills[1].program["weights"] = "int8"
    folders = tensorboard.write(tmp_path, [tensorboard.Run(bill) for bill in bills])
    assert [folder.name for folder in folders] == ["tiny_prefill_b64_c4_h200", "tiny_prefill_b128_c4_h200_weights=int8"]
    for folder, bill in zip(folders, bills, strict=True):
        kept = {tag: shown(folder).SummaryMetadata(tag).plugin_data.content for tag in
                (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)}  # fmt: skip
        experiment = metadata.parse_experiment_plugin_data(kept[metadata.EXPERIMENT_TAG])
        assert {info.name for info in experiment.hparam_infos} == {"batch", "weights"}  # in what they differ
        metrics = {info.name.tag for info in experiment.metric_infos}
        assert metrics <= scalars(folder).keys() and "bill/dollars_per_million_tokens" in metrics
        start = metadata.parse_session_start_info_plugin_data(kept[metadata.SESSION_START_INFO_TAG])
        about = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in start.hparams.items()}
        assert about == {
            **{"model": "tiny", "step": "prefill", "context": 4.0, "target": "h200", "mesh": ""},
            **{name: bill.program[name] for name in ("batch", "weights")},
        }


def test_a_bill_alone_has_a_column_for_its_weights(tmp_path):
    """Bills that are made one by one are a sweep, too, and TensorBoard takes the columns of any one of them."""
    (folder,) = tensorboard.write(tmp_path, [tensorboard.Run(read(a_bill()))])
    content = shown(folder).SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    names = {info.name for info in metadata.parse_experiment_plugin_data(content).hparam_infos}
    assert names == {"model", "step", "batch", "context", "target", "mesh", "weights"}


def test_pictures_are_whole(tmp_path):
    bill = measured(read(a_bill()))
    (folder,) = tensorboard.write(tmp_path, [tensorboard.Run(bill)])
    events = shown(folder)
    assert set(events.Tags()["images"]) == {f"bill/{x}" for x in ("bytes", "flops", "seconds", "roofline", "measured")}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            image.load()
            assert image.format == "PNG" and image.size == (event.width, event.height)
            assert 500 <= image.width <= 1200 and 200 <= image.height <= 1500
            colours = image.convert("RGB").getcolors(1 << 20)
            assert colours and len(colours) > 50 and max(colours)[1] == (255, 255, 255), tag
        assert len(event.encoded_image_string) < 200_000


def test_bars_show_every_byte_flop_and_second():
    bill = read(a_bill())
    assert sum((bar.work for bar in plots.bars(bill)), Work()) == bill.total
    figures = plots.figures(bill)
    for name, whole in (("bytes", bill.total.hbm_bytes), ("flops", bill.total.flops), ("seconds", bill.total.seconds)):
        drawn = sum(bar.get_width() for bar in figures[name].axes[0].patches)
        assert drawn == pytest.approx(whole, rel=1e-12), name


def test_of_many_components_the_least_share_a_bar():
    bill = read(a_bill())
    for n in range(50):
        work = Work(matmul=n + 1, hbm_read={"weights": n + 1})
        bill.rows.append(Row(f"vision/{n}", "forward", None, work))
        bill.total.add(work)
    found = plots.bars(bill, most=10)
    assert [bar.name for bar in found[-2:]] == [
        f"{len({row.component for row in bill.rows}) - 10} others",
        "unattributed",
    ]
    assert len(found) == 12 and {"attention/qkv", "mlp/up", "vision/49"} <= {bar.name for bar in found}
    assert sum((bar.work for bar in found), Work()) == bill.total


def test_points_of_the_roofline_lie_under_its_ceilings():
    bill, chip = measured(read(a_bill())), CHIPS["h200"]
    axes = plots.figures(bill, chip)["roofline"].axes[0]
    assert axes.xaxis.get_major_formatter()(0.1) == "0.1"
    lines = axes.lines
    points = [line.get_xydata()[0] for line in lines if line.get_marker() != "None" and len(line.get_xdata()) == 1]
    components = [bar for bar in plots.bars(bill) if bar.work.flops and bar.work.hbm_bytes]
    assert len(points) == 2 * len(components)  # at the roofline, and as measured
    for n, bar in enumerate(components):
        intensity = bar.work.flops / bar.work.hbm_bytes
        for point, times in zip(points[2 * n : 2 * n + 2], (1, 3), strict=True):
            assert point[0] == intensity
            assert point[1] == pytest.approx(bar.work.flops / (times * bar.work.picoseconds) * 1e12, rel=1e-12)
            assert point[1] <= (chip.hbm_bytes_per_second or 0) * intensity * 1.001


HOSTILE = ("<script>alert(1)</script>", "```\n<b>x</b>", "    <i>", "$x^{2$", "\x1b[31m", "[a](javascript:x)", "名前")


def test_names_of_other_programs_do_no_harm(tmp_path):
    bill = read(a_bill())
    for name in HOSTILE:
        work = Work(matmul=10**9, hbm_read={name: 10**6})
        bill.rows.append(Row(name, "forward", None, work))
        bill.total.add(work)
    bill.notes += HOSTILE
    bill.program |= {"model": HOSTILE[0], "flags": {"x": HOSTILE[1]}}
    (folder,) = tensorboard.write(tmp_path, [tensorboard.Run(bill)])
    assert folder.parent == tmp_path
    (event,) = shown(folder).Tensors("bill/text_summary")
    (text,) = event.tensor_proto.string_val
    page = markdown_to_safe_html(text)
    tags = re.findall(r"<[^>]*>", page)
    assert set(tags) == {"<pre>", "<code>", "</code>", "</pre>"} and len(tags) == 4, "all of it is code"
    said = re.sub(r"<[^>]*>", "", page).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert said.strip() == render.to_text(bill).strip()
    assert all(tag.isprintable() for tag in shown(folder).Tags()["scalars"])


@pytest.mark.parametrize("model", ["../../etc/x", "/etc/x", "a/b\\c", "", ".hidden", "x" * 500, "\0\n", "名前"])
def test_a_run_is_a_folder_right_below_the_log_folder(model, tmp_path):
    bill = read(a_bill("host"))
    bill.program["model"] = model
    name = tensorboard.run_name(bill.program)
    folder = tmp_path / "log" / name
    folder.mkdir(parents=True)
    assert folder.resolve().parent == (tmp_path / "log").resolve() and not name.startswith(".")


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_measured_step_with_its_trace_where_the_profile_tab_looks(stepbill, tmp_path):
    logdir = tmp_path / "a log"
    status, out, err = stepbill(*TINY, "--batch=2", "--measure", f"--logdir={logdir}", "--format=json")
    assert (status, err) == (0, f"to look at it: tensorboard --logdir='{logdir}'\n")
    bill = read(out)
    (folder,) = logdir.iterdir()
    assert folder.name == "nano(L=2,D=64,N=4,K=2,F=128)_decode_b2_c32_host"
    found = scalars(folder)
    assert bill.measured and found["bill/measured_seconds"] == np.float32(bill.measured["seconds"])
    core = bill.component("attention/core")
    assert found["measured_seconds/attention/core"] == np.float32(core.measured_picoseconds * 1e-12)
    assert {"bill/measured", "bill/roofline"} <= set(shown(folder).Tags()["images"])
    (xplane,) = folder.glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(xplane))
    (host,) = (plane for plane in data.planes if plane.name == "/host:CPU")
    (ours,) = (plane for plane in data.planes if plane.name == "/device:CUSTOM:components")
    ops = [e for line in host.lines for e in line.events if "hlo_op" in dict(e.stats)]
    lines = {line.name: list(line.events) for line in ours.lines}
    rows = {row.component for row in bill.rows} | {UNATTRIBUTED}
    assert {"attention/core", "mlp/up", "logits"} <= lines.keys() <= rows
    assert list(lines) == sorted(lines, key=plots.place)
    began = min(event.start_ns for event in ops)
    for name, events in lines.items():
        assert {event.name for event in events} == {name}
        assert events[0].start_ns >= began - 1
        assert all(before.end_ns <= after.start_ns for before, after in pairwise(events))
    # Whenever the device is busy, some component is.
    at_work_ns = sum(event.duration_ns for events in lines.values() for event in events)
    assert at_work_ns >= 0.999 * bill.total.measured_picoseconds / 1000


SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)).map(lambda span: (span[0], sum(span))), max_size=6)


@given(SPANS, st.integers(0, 20), st.integers(0, 10))
def test_what_waits_is_drawn_where_nothing_runs(spans, start, length):
    running = {moment for first, last in spans for moment in range(first, last)}
    drawn = [*tensorboard._between(tensorboard._united(spans), start, start + length)]
    assert [moment for span in drawn for moment in range(*span)] == sorted({*range(start, start + length)} - running)
    assert all(first < last for first, last in drawn)


def test_bills_compared(stepbill, tmp_path):
    for batch in (64, 128):
        (tmp_path / f"{batch}.json").write_text(a_bill(batch=batch))
    variants = f"--compare={tmp_path / '64.json'};{tmp_path / '128.json'}"
    plain = stepbill(variants)
    status, out, err = stepbill(variants, f"--logdir={tmp_path / 'log'}")
    assert (status, out, err) == (0, plain[1], f"to look at it: tensorboard --logdir={tmp_path / 'log'}\n")
    names = {"tiny_prefill_b64_c4_h200", "tiny_prefill_b128_c4_h200", "comparison"}
    assert {folder.name for folder in (tmp_path / "log").iterdir()} == names
    (event,) = shown(tmp_path / "log" / "comparison").Tensors("comparison/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert [line[4:] for line in text.splitlines()] == [*out.splitlines(), ""]


def test_the_demonstration(stepbill, tmp_path, monkeypatch):
    bill = read(a_bill("host"))
    done = [
        demo.Timed("train", bill, 0.5, 100, ""),
        demo.Timed("decode", replace(bill, program={**bill.program}), 2, 8, ""),
    ]
    done[1].bill.program["step"] = "decode"
    monkeypatch.setattr(demo, "main", lambda form, keep: done)
    status, _, err = stepbill(f"--logdir={tmp_path}")
    assert status == 0 and err.startswith("to look at it: ")
    rates = [
        scalars(tmp_path / f"tiny_{step}_b64_c4_host")["bill/measured_tokens_per_second"]
        for step in ("prefill", "decode")
    ]
    assert rates == [200.0, 4.0]


@pytest.mark.parametrize(
    "argv", [TINY, (), ("--hlo=DIR/dump",), (*TINY, "--measure"), ("--compare=DIR/a.json;DIR/b.json",)], ids=str
)
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_compiled(stepbill, argv, tmp_path, monkeypatch):
    for what in ("bill_step", "_demonstrate"):
        monkeypatch.setattr(command, what, lambda *_: pytest.fail("it has begun"))
    for name in ("dump", "file", "a.json", "b.json"):
        (tmp_path / name).write_text("HloModule m" if name == "dump" else a_bill("host"))
    argv = [flag.replace("DIR", str(tmp_path)) for flag in argv]
    for folder in (tmp_path / "file", "/proc/nowhere"):
        status, out, err = stepbill(*argv, f"--logdir={folder}")
        assert (status, out) == (2, "")
        assert err.startswith(f"stepbill: --logdir={folder}: cannot write there: ") and err.count("\n") == 1


def test_what_is_not_installed_is_named(stepbill, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard.util, "find_spec", lambda name: None)
    status, out, err = stepbill(*TINY, f"--logdir={tmp_path}")
    assert (status, out) == (2, "")
    assert err == f"stepbill: --logdir={tmp_path}: its pictures need matplotlib: pip install 'stepbill[board]'\n"


def test_the_log_folder_is_no_hyperparameter():
    values = flags.parse(["--batch=2", "--logdir=x"])
    assert flags.given_flags(values) == {"batch": 2}
