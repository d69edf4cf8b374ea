"""One process of a load run, for locust; run_load.py starts it. Its users are those of the plan's profile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gevent
from http_users import Canceller, SlowReader
from load_plan import Plan
from load_records import MOMENTS, Recorder, RecordFiles
from load_user import LoadUser
from locust import events
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner
from users import AdapterMixUser, BurstUser, ChatUser, LongPromptUser, StreamUser, WrongInputUser

PLAN = LoadUser.plan = Plan.of_environment()
RECORDS = "records"
"""Where a worker's message to the master has the records."""
USERS = (
    StreamUser,
    ChatUser,
    LongPromptUser,
    BurstUser,
    SlowReader,
    Canceller,
    AdapterMixUser,
    WrongInputUser,
)


@events.init.add_listener
def begin(environment: Environment, runner: Any, **_: Any) -> None:
    chosen = [user for user in USERS if user.kind in PLAN.profile.users]
    for user in chosen:
        user.fixed_count = PLAN.profile.users[user.kind]
    environment.user_classes = chosen
    if isinstance(runner, WorkerRunner):
        _record(environment)
    elif isinstance(runner, MasterRunner):
        _gather(environment, runner, Path(environment.parsed_options.csv_prefix).parent)


def _record(environment: Environment) -> None:
    recorder = LoadUser.recorder = Recorder()

    def send(client_id: str, data: dict[str, Any]) -> None:
        data[RECORDS] = recorder.drain()

    environment.events.report_to_master.add_listener(send)


def _gather(environment: Environment, runner: MasterRunner, folder: Path) -> None:
    files = RecordFiles(folder)
    moments: dict[str, float] = {}

    def receive(client_id: str, data: dict[str, Any]) -> None:
        files.write(data[RECORDS])

    def note_all_started(user_count: int) -> None:
        moments["all_started"] = time.time()
        gevent.spawn_later(PLAN.profile.run_time, end)

    def end() -> None:
        # Not locust's own --run-time: it would end the workers before the last requests have been reported.
        runner.stop()
        runner.quit()

    def note_end(environment: Environment) -> None:
        moments["ended"] = time.time()

    def finish(environment: Environment, **_: Any) -> None:
        files.close()
        (folder / MOMENTS).write_text(json.dumps(moments) + "\n")
        # Whether the run passed is not for locust to say.
        environment.process_exit_code = 0

    environment.events.worker_report.add_listener(receive)
    environment.events.spawning_complete.add_listener(note_all_started)
    environment.events.test_stopping.add_listener(note_end)
    environment.events.quitting.add_listener(finish)
