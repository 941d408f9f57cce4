"""What workers print reaches the driver's terminal, and says who printed it."""

from __future__ import annotations

import re

SCRIPT = """
ray.init(num_cpus=1, **INIT)

@ray.remote
def f():
    import os, sys
    print("to stdout")
    print("to stderr", file=sys.stderr)
    print("two\\nlines")
    return os.getpid()

print("PID", ray.get(f.remote()), flush=True)
ray.shutdown()
"""


def everything(done):
    # Colours are for terminals.
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def drain(script):
    # Ray forwards lines in its own time, so its driver lingers. hpcray needs no such favour:
    # `shutdown` ends once everything that was printed has been shown.
    linger = "ray.__name__ == 'ray' and __import__('time').sleep(2); ray.shutdown()"
    return script.replace("ray.shutdown()", linger)


def test_task_output_reaches_the_driver(run_driver):
    done = run_driver(drain(SCRIPT), log_to_driver=True)
    text = everything(done)
    pid = text.split("PID ")[1].split()[0]
    (line,) = [line for line in text.splitlines() if "to stdout" in line]
    assert re.fullmatch(rf"\(f pid={pid}.*\) to stdout", line)
    assert re.search(rf"\(f pid={pid}.*\) to stderr", text)
    for part in ("two", "lines"):
        assert re.search(rf"\(f pid={pid}.*\) {part}\n", text)


def test_actor_output_names_the_class(run_driver):
    done = run_driver(
        drain(
            """
            ray.init(num_cpus=1, **INIT)

            @ray.remote
            class Speaker:
                def speak(self):
                    print("spoken")

            ray.get(Speaker.remote().speak.remote())
            ray.shutdown()
            """
        ),
        log_to_driver=True,
    )
    assert re.search(r"\(Speaker pid=\d+.*\) spoken", everything(done))


def test_log_to_driver_false(run_driver):
    done = run_driver(
        drain(
            """
            ray.init(num_cpus=1, **{**INIT, "log_to_driver": False})
            ray.get(ray.remote(lambda: print("secret")).remote())
            ray.shutdown()
            """
        ),
        log_to_driver=True,
    )
    assert "secret" not in everything(done)


def test_the_drivers_own_output_is_untouched(run_driver):
    done = run_driver(
        """
        ray.init(num_cpus=1, **INIT)
        print("mine")
        ray.shutdown()
        """
    )
    assert done.stdout.splitlines() == ["mine"]


def test_output_of_a_worker_that_dies_is_not_lost(run_driver):
    done = run_driver(
        drain(
            """
            ray.init(num_cpus=1, **INIT)

            @ray.remote(max_retries=0)
            def f():
                import os
                print("last words", flush=True)
                os._exit(1)

            try:
                ray.get(f.remote())
            except ray.exceptions.WorkerCrashedError:
                pass
            ray.shutdown()
            """
        ),
        log_to_driver=True,
    )
    assert "last words" in everything(done)
