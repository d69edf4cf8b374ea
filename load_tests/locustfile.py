"""The load test: locust -f load_tests/locustfile.py --headless --profile smoke, from the repository's root.

The profile (profiles.py) says how many users run, for how long and against which server, unless --users,
--spawn-rate, --run-time or --host do. The exit code is 1 when a request failed or a limit of the profile was missed.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from locust import events
from locust.env import Environment

from load_tests.profiles import PROFILES
from load_tests.users import GenerateUser
from load_tests.verdict import Observed, shortfalls

__all__ = ["GenerateUser"]


@events.init.add_listener
def apply_profile(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    options.profile = options.profile or "smoke"
    if options.profile not in PROFILES:
        sys.exit(f"--profile: {options.profile!r} is not one of {', '.join(PROFILES)}")
    profile = GenerateUser.profile = PROFILES[options.profile]
    options.num_users = options.num_users or profile.users
    options.spawn_rate = options.spawn_rate or profile.spawn_rate
    options.run_time = options.run_time or profile.run_time
    environment.host = environment.host or profile.host
    environment.stop_timeout = environment.stop_timeout or profile.stop_timeout


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    observed = {
        entry.name: Observed(
            num_events=entry.num_requests,
            num_failures=entry.num_failures,
            median=entry.median_response_time,
            percentile_95=entry.get_response_time_percentile(0.95),
        )
        for entry in environment.stats.entries.values()
    }
    options: Any = environment.parsed_options
    problems = shortfalls(GenerateUser.profile, observed)
    for problem in problems:
        logging.error("profile %s: %s", options.profile, problem)
    environment.process_exit_code = 1 if problems else 0
