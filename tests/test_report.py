"""The report: counted from records, a snapshot, printable and plain."""

from __future__ import annotations

import json
import threading

from lsync_compile.options import resolve_options
from lsync_compile.report import CaptureRecord, GraphRecord, PassRecord, Session


def record(name: str, kind: str, frame: int = 0, **more: object) -> GraphRecord:
    target = name.partition(".")[0]
    return GraphRecord(name, target, frame, kind, "2x4 float32 cpu", nodes_in=10, **more)


def session() -> Session:
    made = Session("Pipe", resolve_options("turbo"))
    made.add_graph(
        record(
            "unet.0.0",
            "first",
            nodes_out=8,
            lowering="eager",
            passes=[
                PassRecord("remove_noops", "clean", "applied", 2, 10, 8, 0.004),
                PassRecord("share_repeated", "clean", "vetoed", reason="add_ writes in place"),
            ],
        )
    )
    made.add_graph(record("unet.1.1", "first", frame=1, fallback="lowering: no"))
    made.add_graph(record("unet.0.2", "variant", cache_hit=True))
    made.add_graph(record("unet.0.3", "recompile"))
    return made


def test_counters() -> None:
    assert session().report().counters == {
        "runs": 0,
        "graphs": 4,
        "variants": 1,
        "recompiles": 1,
        "breaks": 1,
        "fallbacks": 1,
        "cache_hits": 1,
        "captured": 0,
        "calls": 0,
    }


def test_text_says_what_was_done_and_why_not() -> None:
    text = str(session().report())
    assert "recompiles 1, graph breaks 1, eager fallbacks 1" in text
    assert "remove_noops: 2 matches, nodes 10 -> 8, 4 ms" in text
    assert "share_repeated: vetoed (add_ writes in place)" in text
    assert "not compiled: lowering: no" in text


def test_text_says_what_is_replayed_and_the_memory_it_takes() -> None:
    made = session()
    replayed = CaptureRecord("captured", captures=1, replays=40, planned_bytes=3 * 2**29)
    replayed.summed_bytes, replayed.pool_bytes = 30 * 2**30, 2**30
    made.add_graph(record("unet.0.4", "variant", capture=replayed))
    made.add_graph(record("unet.0.5", "variant", capture=CaptureRecord("refused", "it is random")))
    made.add_graph(record("unet.0.6", "variant", capture=CaptureRecord()))
    text = str(made.report())
    assert (
        "CUDA graph: 40 replays; memory 1.5 GiB planned (30.0 GiB without reuse), 1.0 GiB in its "
        "pool, inputs 0 B; 0.00 s"
    ) in text
    assert "CUDA graph: none (it is random)" in text
    assert "CUDA graph: not called yet" in text
    assert made.report().counters["captured"] == 1


def test_plain_values_go_through_json() -> None:
    values = json.loads(json.dumps(session().report().to_dict()))
    assert values["counters"]["graphs"] == 4
    assert values["graphs"][0]["passes"][0]["matches"] == 2
    assert values["options"]["preset"] == "turbo"


def test_a_report_is_a_snapshot() -> None:
    made = session()
    before = made.report()
    made.count_run()
    made.note("later")
    assert before.runs == 0
    assert "later" not in before.notes
    assert made.report().runs == 1


def test_a_note_is_taken_once() -> None:
    made = session()
    assert made.note("once")
    assert not made.note("once")
    assert made.report().notes.count("once") == 1


def test_threads_count_every_call() -> None:
    made = Session("Pipe", resolve_options())
    graph = record("unet.0.0", "first")
    made.add_graph(graph)
    threads = [
        threading.Thread(target=lambda: [made.count_call(graph) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.report().counters["calls"] == 8000


def test_optimisations_count_and_work_is_timed() -> None:
    session = Session("pipe", resolve_options())
    session.count("face cache", frames=0, near=0)
    session.count("face cache", frames=3)
    session.most("face cache", worst_px=1.5)
    session.most("face cache", worst_px=0.5)
    session.count("encodings", bytes=3 * 2**20)
    session.time("decode", 0.25)
    session.time("decode", 0.75)
    report = session.report()
    session.count("face cache", frames=1)
    assert report.features["face cache"] == {"frames": 3, "near": 0, "worst_px": 1.5}
    text = str(report)
    assert "face cache: frames 3, near 0, worst px 1.5" in text
    assert "encodings: bytes 3.0 MiB" in text
    assert "time: decode 1.00 s in 2 calls (500.0 ms each)" in text
    assert json.loads(json.dumps(report.to_dict()))["times"]["decode"]["calls"] == 2
