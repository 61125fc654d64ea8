"""Draws the board: from its state to lines that fit a terminal. Texts of others have no control characters.

From top to bottom: the queue in three lines, its depth by priority beside the tenants that wait, the workers,
the running jobs, a message and the keys. Workers and jobs share the lines that remain, and scroll.
"""

from rich.text import Text

from ingine.contract.keys import SILENT_AFTER_S
from ingine.producer.results import NO_WORKER
from ingine.producer.watch import RunningJob
from ingine.terminal import visible
from ingine.top.board import Board, Pane
from ingine.top.columns import Column, cell, duration, heading, last_lines, rate, row, shorten, size
from ingine.top.figures import Percentiles, number

STALE_AFTER_S = 3.0
"""The board says that it is not up to date once it is older."""
KEYS = "q quit  tab list  ↑↓ select  p pause  r resume  d drain  c cancel  t text"
_TENANT_WIDTH = 22
_QUEUE = (Column("QUEUE", 9), Column("waiting", -8), Column("running", -8))
_TALL = 40
"""Height of a terminal from which on a job's text may have several lines."""


def frame(board: Board, width: int, height: int | None, now_s: float) -> list[Text]:
    """The lines of the board, `height` at most and each `width` cells at most. None: as many as there are.

    now_s: now, by the clock of `board.read_at_s`.
    """
    footer = _footer(board, now_s)
    if board.snapshot is None:
        lines = [Text(f"queue {board.queue}", "bold"), Text("reading ...", "dim")]
    else:
        lines = [*_summary(board), *_queues(board, width)]
        room = None if height is None else max(0, height - len(lines) - len(footer))
        lines += _lists(board, width, room, text_lines=3 if (height or 0) >= _TALL else 1)
        if _is_stale(board, now_s):
            for line in lines:
                line.style = "dim"
    if height is None:
        lines += footer
    else:
        num_lines = max(0, height - len(footer))
        lines = lines[:num_lines]
        lines += [Text("")] * (num_lines - len(lines)) + footer
        lines = lines[:height] if num_lines else lines[-height:]
    return [_fitted(line, width) for line in lines]


def _fitted(line: Text, width: int) -> Text:
    return Text(shorten(line.plain, width), style=line.style, no_wrap=True)


def _is_stale(board: Board, now_s: float) -> bool:
    return bool(board.error) or (board.read_at_s is not None and now_s - board.read_at_s > STALE_AFTER_S)


def _summary(board: Board) -> list[Text]:
    info, figures = board.snapshot.info, board.figures
    partitions = f"  {info.num_partitions} partitions" if info.num_partitions > 1 else ""
    paused = "  PAUSED" if info.paused else ""
    title = (
        f"queue {info.queue}{partitions}  serving {info.num_serving} of {len(info.workers)} workers{paused}"
    )
    totals = [
        f"{rate(figures.tokens_per_s)} tokens/s",
        f"{rate(figures.ended_per_s)} jobs/s",
        f"delayed {info.num_delayed}",
        f"dead {info.num_dead}",
        f"{size(info.num_bytes)} of {size(info.max_bytes * info.num_partitions)}",
    ]
    latencies = f"wait {_percentiles(figures.wait_s)}   first token {_percentiles(figures.first_token_s)}"
    return [
        Text(title, "bold red" if info.paused or not info.num_serving else "bold"),
        Text("  ".join(totals)),
        Text(latencies),
    ]


def _percentiles(value: Percentiles | None) -> str:
    return f"p50 {duration(value.p50)} p95 {duration(value.p95)}" if value else "-"


def _queues(board: Board, width: int) -> list[Text]:
    """The depth by priority, and beside it the tenants with the most waiting jobs."""
    info, tenants = board.snapshot.info, board.tenants
    num_waiting = sum(info.waiting.values())
    sampled = f", of the oldest {tenants.total()}" if 0 < tenants.total() < num_waiting else ""
    lines = [f"{heading(_QUEUE)}   WAITING BY TENANT{sampled}"]
    room = max(0, (width - len(lines[0].partition("   WAITING")[0]) - 3) // (_TENANT_WIDTH + 1))
    largest = tenants.most_common(room * len(info.waiting))
    for line_number, (priority, waiting) in enumerate(info.waiting.items()):
        depth = row(_QUEUE, [priority, str(waiting), str(info.running[priority])])
        beside = largest[line_number * room : (line_number + 1) * room]
        shown = [
            f"{cell(name or '(none)', _TENANT_WIDTH - 6)} {cell(str(count), -5)}" for name, count in beside
        ]
        lines.append(f"{depth}   {' '.join(shown)}".rstrip())
    return [Text(lines[0], "bold"), *map(Text, lines[1:])]


def _lists(board: Board, width: int, room: int | None, *, text_lines: int) -> list[Text]:
    """Workers and running jobs, with a heading each, in `room` lines."""
    workers, jobs = board.workers, board.jobs
    lines_per_job = 1 + text_lines if board.show_text else 1
    if room is None:
        num_workers, num_jobs = len(workers), len(jobs)
    else:
        rows = max(0, room - 2)
        num_workers = min(len(workers), max(rows // 3, rows - lines_per_job * len(jobs)))
        num_jobs = (rows - num_workers) // lines_per_job
    return [
        *_worker_lines(board, width, num_workers),
        *_job_lines(board, width, num_jobs, text_lines if board.show_text else 0),
    ]


def _window(num_rows: int, selected: int | None, num_shown: int) -> range:
    """The rows to show so that the selected one is among them."""
    num_shown = max(0, num_shown)
    if num_rows <= num_shown:
        return range(num_rows)
    start = 0 if selected is None else min(max(0, selected - num_shown // 2), num_rows - num_shown)
    return range(start, start + num_shown)


def _heading(board: Board, pane: Pane, columns: list[Column]) -> Text:
    mark = ">" if board.interactive and board.pane is pane else " "
    return Text(f"{mark} {heading(columns)}", "bold")


def _line(board: Board, pane: Pane, name: str, text: str, style: str) -> Text:
    selected = board.interactive and board.selected.get(pane) == name
    return Text(f"{'*' if selected else ' '} {text}", "reverse" if selected else style)


def _worker_lines(board: Board, width: int, num_shown: int) -> list[Text]:
    workers, selected = board.workers, board.selected.get(Pane.WORKERS)
    name_width = max(12, min(40, (width - 46) // 2))
    title = f"WORKERS {len(workers)}"
    columns = [Column(title, name_width), Column("state", 11), Column("jobs", -5), Column("batch", -5)]
    columns += [Column("KV", -4), Column("tokens/s", -8)]
    columns.append(Column("model", max(5, width - 2 - sum(abs(c.width) + 1 for c in columns))))
    lines = [_heading(board, Pane.WORKERS, columns)]
    index = workers.index(selected) if selected else None
    for worker in (workers[n] for n in _window(len(workers), index, num_shown)):
        beat = board.snapshot.info.workers[worker]
        state, style = _state(board, worker, beat)
        kv = number(beat.get("kv_usage"))
        cells = [
            worker,
            state,
            _count(beat.get("num_jobs")),
            _count(beat.get("num_running")),
            "-" if kv is None else f"{kv:.0%}",
            rate(board.figures.worker_tokens_per_s.get(worker)),
            str(beat.get("model", "?")),
        ]
        lines.append(_line(board, Pane.WORKERS, worker, row(columns, cells), style))
    return lines


def _state(board: Board, worker: str, beat: dict) -> tuple[str, str]:
    """What a worker's row says of its state, and in which style."""
    silent_s = beat["silent_s"]
    if silent_s > SILENT_AFTER_S:
        return f"{beat.get('state')} {f'{silent_s:.0f} s' if silent_s < 86_400 else ''}".rstrip(), "red"
    if worker in board.snapshot.info.draining:
        return "draining", "yellow"
    state = str(beat.get("state", "?"))
    return state, "" if state == "serving" else "yellow"


def _count(value: object) -> str:
    found = number(value)
    return "?" if found is None else f"{found:.0f}"


def _job_lines(board: Board, width: int, num_shown: int, text_lines: int) -> list[Text]:
    jobs, selected = board.jobs, board.selected.get(Pane.JOBS)
    wide = max(0, width - 80)
    num_running = sum(board.snapshot.info.running.values())
    title = f"JOBS {num_running}" if len(jobs) >= num_running else f"JOBS {len(jobs)} of {num_running}"
    columns = [Column(title, 20 + wide // 3), Column("priority", 8), Column("tenant", 10 + wide // 4)]
    columns += [Column("worker", 12 + wide // 4), Column("try", -3), Column("tokens", -6)]
    columns += [Column("/s", -5), Column("age", -7)]
    lines = [_heading(board, Pane.JOBS, columns)]
    if board.snapshot.refused:
        lines.append(Text(f"  not shown: {visible(board.snapshot.refused)}", "yellow"))
        num_shown -= 1
    index = next((n for n, job in enumerate(jobs) if job.job_id == selected), None)
    for job in (jobs[n] for n in _window(len(jobs), index, num_shown)):
        cells = _job_cells(board, job)
        lines.append(_line(board, Pane.JOBS, job.job_id, row(columns, cells), ""))
        texts = last_lines(job.text, max(1, width - 4), text_lines) if text_lines else []
        lines += [Text(f"    {text}", "cyan") for text in (texts + [""] * text_lines)[:text_lines]]
    return lines


def _job_cells(board: Board, job: RunningJob) -> list[str]:
    return [
        job.job_id,
        job.priority,
        job.tenant or "",
        job.worker,
        str(job.attempt),
        str(job.position),
        rate(board.figures.job_tokens_per_s.get(job.job_id)),
        duration(job.age_s),
    ]


def _footer(board: Board, now_s: float) -> list[Text]:
    status = _status(board, now_s)
    if board.interactive:
        return [status, Text(KEYS, "dim")]
    return [status] if status else []


def _status(board: Board, now_s: float) -> Text:
    """The most important of: a question, an outage, the outcome of an action, a queue without workers."""
    if board.question:
        return Text(visible(board.question), "bold yellow")
    if _is_stale(board, now_s):
        since = "" if board.read_at_s is None else f" for {duration(now_s - board.read_at_s)}"
        reason = f": {visible(board.error)}" if board.error else ""
        return Text(f"no answer{since}, trying again{reason}", "bold red")
    if board.message:
        return Text(visible(board.message), "bold")
    if board.snapshot and not board.snapshot.info.num_serving:
        return Text(NO_WORKER % repr(board.queue), "yellow")
    return Text("")
