"""The board fits any terminal, says what it shows, and lets nothing of others reach the terminal."""

import re
from collections import Counter

import pytest
from rich.cells import cell_len

from ingine.producer.watch import Snapshot
from ingine.top.board import Board, Pane
from ingine.top.columns import cell, duration, last_lines, rate, size
from ingine.top.figures import Figures, Percentiles
from ingine.top.frame import KEYS, frame
from tests.top.boards import WORKERS, beat, board, job, queue_info

HOSTILE = "\x1b]0;owned\x07\x9b31m\r\u202eevil\u2066\x7f\n"
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def lines(shown: Board, width: int = 80, height: int | None = 24, now_s: float = 0.0) -> list[str]:
    return [line.plain.rstrip() for line in frame(shown, width, height, now_s)]


def test_80_by_24():
    shown = board(show_text=True)
    shown.figures = Figures(
        tokens_per_s=152.4,
        ended_per_s=3.25,
        worker_tokens_per_s={"gpu-0-a1": 100.4, "gpu-1-b2": 52},
        job_tokens_per_s={"first": 31.25},
        wait_s=Percentiles(0.25, 1.5),
        first_token_s=Percentiles(2, 70),
    )
    shown.press("down")
    assert lines(shown) == [
        "queue chat  serving 2 of 3 workers",
        "152 tokens/s  3.2 jobs/s  delayed 4  dead 2  3.0 MiB of 1.0 GiB",
        "wait p50 0.25 s p95 1.5 s   first token p50 2.0 s p95 70 s",
        "QUEUE      waiting  running   WAITING BY TENANT, of the oldest 200",
        "high             3        1   acme               130 (none)              40",
        "normal         120        2   beta                30",
        "low           9000        0",
        "  WORKERS 3         state        jobs batch   KV tokens/s model",
        "  gpu-0-a1          serving         3     2  25%      100 Qwen/Qwen3-0.6B",
        "  gpu-1-b2          serving         3     2  98%     52.0 Qwen/Qwen3-0.6B",
        "  gpu-2-c3          silent 12 s     3     2  25%        - Qwen/Qwen3-0.6B",
        "> JOBS 3               priority tenant     worker       try tokens    /s     age",
        "* first                high     acme       gpu-0-a1       1     42  31.2   3.2 s",
        "",
        "  second               normal   acme       gpu-0-a1       1     42     -   3.2 s",
        "    Once upon a time",
        "  third                normal   acme       gpu-0-a1       2     42     -   3.2 s",
        "",
        *[""] * 5,
        KEYS,
    ]


def test_140_by_50():
    shown = board(jobs=[job(f"job-{n}-{'x' * 24}", text="word " * 100) for n in range(30)], show_text=True)
    shown.tenants = Counter({f"tenant-{n}": 100 - n for n in range(40)})
    text = lines(shown, 140, 50)
    assert len(text) == 50 and text[-1] == KEYS
    assert text[4].split()[3:] == ["tenant-0", "100", "tenant-1", "99", "tenant-2", "98", "tenant-3", "97"]
    listed = [line for line in text if line.startswith("  job-")]
    assert len(listed) == 9 and listed[0].startswith(f"  job-0-{'x' * 24} ")
    first = text.index(listed[0])
    assert all(line.startswith("    word") or "word" in line for line in text[first + 1 : first + 4])


@pytest.mark.parametrize("width", [1, 7, 20, 40, 80, 140, 300])
@pytest.mark.parametrize("height", [1, 2, 5, 10, 24, 50])
def test_it_fits(width, height):
    workers = {f"worker-{n}-日本語": beat() for n in range(40)}
    jobs = [job(f"job-{n}", tenant="日本語" * 9, text="日本語 \U0001f469 naïve" * 30) for n in range(100)]
    for show_text in (False, True):
        shown = board(queue_info(workers), jobs, show_text=show_text)
        shown.press("up")
        shown.press("c")
        drawn = lines(shown, width, height)
        assert len(drawn) == height
        assert max(map(cell_len, drawn)) <= width
        assert drawn[-1] in KEYS or drawn[-1].endswith("…") or width == 1


def test_before_the_first_read():
    assert lines(Board("chat", read_at_s=0.0))[:2] == ["queue chat", "reading ..."]
    assert lines(Board("chat", read_at_s=0.0), now_s=4.0)[-2] == "no answer for 4.0 s, trying again"


def test_an_outage_is_said_and_the_last_state_stays():
    shown = board()
    shown.error = "Redis at localhost:1 cannot be reached"
    drawn = frame(shown, 80, 24, 12.0)
    assert drawn[0].plain == "queue chat  serving 2 of 3 workers" and drawn[0].style == "dim"
    assert drawn[-2].plain == "no answer for 12 s, trying again: Redis at localhost:1 cannot be reached"
    shown.update(shown.snapshot, Figures(), 13.0)
    assert lines(shown, now_s=13.5)[-2] == ""


def test_a_slow_answer_is_said_too():
    assert lines(board(), now_s=2.0)[-2] == ""
    assert lines(board(), now_s=5.0)[-2] == "no answer for 5.0 s, trying again"


def test_no_worker():
    drawn = lines(board(queue_info({"gpu-0": beat(silent_s=100)}), []))
    assert drawn[0] == "queue chat  serving 0 of 1 workers"
    assert drawn[-2].startswith("no worker serves queue 'chat'")
    once = lines(board(queue_info({}), [], interactive=False), height=None)
    assert once[-1].startswith("no worker serves queue 'chat'")


def test_paused_and_draining():
    drawn = lines(board(queue_info(paused=True, draining=["gpu-1-b2"], num_partitions=4)))
    assert drawn[0] == "queue chat  4 partitions  serving 2 of 3 workers  PAUSED"
    assert "gpu-1-b2          draining" in "\n".join(drawn)


def test_the_selected_row_is_in_view():
    workers = {f"w{n:03}": beat() for n in range(50)}
    shown = board(queue_info(workers), [job(f"job-{n:03}") for n in range(100)])
    for pane, names in ((Pane.JOBS, range(0, 100, 7)), (Pane.WORKERS, range(0, 50, 7))):
        for n in names:
            name = f"job-{n:03}" if pane is Pane.JOBS else f"w{n:03}"
            shown.selected[pane] = name
            assert any(line.startswith(f"* {name}") for line in lines(shown))


def test_more_jobs_run_than_are_listed():
    running = {"high": 0, "normal": 0, "low": 5000}
    assert any(line.startswith("> JOBS 3 of 5000") for line in lines(board(queue_info(running=running))))


def test_jobs_that_may_not_be_listed():
    shown = board()
    shown.update(Snapshot(queue_info(), [], refused="no permissions to run 'xrange'"), Figures(), 0.0)
    assert "  not shown: no permissions to run 'xrange'" in lines(shown)


def test_no_text_is_shown_unless_asked():
    assert not any("Once upon" in line for line in lines(board()))
    assert any("Once upon" in line for line in lines(board(show_text=True)))


def test_control_characters_of_others_are_shown_as_escapes():
    workers = {HOSTILE: beat(state=HOSTILE, model=HOSTILE), **WORKERS}
    jobs = [job(HOSTILE, tenant=HOSTILE, worker=HOSTILE, text=HOSTILE)]
    shown = board(queue_info(workers), jobs, show_text=True)
    shown.tenants = Counter({HOSTILE: 5})
    shown.press("down")
    for key in ("", "c"):
        shown.press(key)
        for width in (80, 200):
            drawn = lines(shown, width)
            assert not any(CONTROL.search(line) for line in drawn)
            assert sum(r"\x1b]0;own" in line for line in drawn) > 2
    shown.press("n")
    shown.error = shown.message = HOSTILE
    assert not any(CONTROL.search(line) for line in lines(shown))


def test_nonsense_in_a_heartbeat():
    workers = {
        "a": {"silent_s": 1_700_000_000, "state": "lost"},
        "b": beat(num_jobs=[], kv_usage="x", model=3),
    }
    drawn = "\n".join(lines(board(queue_info(workers))))
    assert re.search(r"a +lost +\? +\? +- +- \?", drawn) and re.search(r"b +serving +\? +2 +- +- 3", drawn)


def test_numbers():
    assert [duration(s) for s in (0.004, 1, 9.96, 61, 240, 7200)] == [
        *("0.00 s", "1.0 s", "10 s", "61 s", "4 min", "2 h")
    ]
    assert [size(n) for n in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert [rate(r) for r in (None, 0, 99.94, 1234)] == ["-", "0.0", "99.9", "1234"]


def test_cells_of_wide_characters():
    assert cell("日本語", 6) == "日本語" and cell("日本語", 5) == "日本…" and cell("日本", -6) == "  日本"
    assert last_lines("a\n b\tc" + "日" * 4, 4, 2) == ["日日", "日日"]
