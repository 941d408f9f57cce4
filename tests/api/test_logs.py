"""What workers print reaches the driver's terminal, and says who printed it."""

from __future__ import annotations

import re

import pytest

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
    assert "to stderr" in done.stderr and "to stderr" not in done.stdout
    assert "to stdout" in done.stdout and "to stdout" not in done.stderr
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


def test_each_line_names_the_task_that_printed_it(run_driver):
    """Whatever ran before and after it on the same worker."""
    done = run_driver(
        drain(
            """
            import os, sys
            ray.init(num_cpus=1, **INIT)

            @ray.remote
            def f(i):
                print("f", i)
                if isinstance(i, int) and i % 2:
                    print("f: no newline", i, end="")

            @ray.remote
            def g(i):
                print("g", i, file=sys.stderr)
                if i % 5 == 0:
                    os.write(1, b"g: from C\\n")

            ray.get([task.remote(i) for i in range(50) for task in (f, g)])
            ray.get(f.options(name="named.1").remote("named.1"))
            ray.shutdown()
            """
        ),
        log_to_driver=True,
    )
    lines = re.findall(r"\((\S+) pid=\d+\) (\S.*)", everything(done))
    texts = [text for _, text in lines]
    for i in range(50):
        assert f"f {i}" in texts and f"g {i}" in texts
    assert ("named.1", "f named.1") in lines
    assert all(text.startswith(name) for name, text in lines if name != "named.1"), lines


def test_an_actor_is_named_by_its_own_repr_once_it_is_made(run_driver):
    done = run_driver(
        drain(
            """
            ray.init(num_cpus=1, **INIT)

            @ray.remote
            class Model:
                def __init__(self, size):
                    self.size = size
                    print("made")

                def __repr__(self):
                    return f"Model(size={self.size})"

                def train(self):
                    print("trained")

            actor = Model.options(name="big").remote(3)
            ray.get(actor.train.remote())
            ray.shutdown()
            """
        ),
        log_to_driver=True,
    )
    assert re.search(r"\(Model pid=\d+\) made", everything(done))
    assert re.search(r"\(Model\(size=3\) pid=\d+\) trained", everything(done))


def test_lines_that_differ_in_numbers_are_counted(run_driver):
    done = run_driver(
        drain(
            """
            import time
            ray.init(num_cpus=4, **INIT)

            @ray.remote
            class Talker:
                def talk(self, i):
                    print("hello from", i)
                    print(i * 1.5)

            talkers = [Talker.remote() for _ in range(4)]
            ray.get([talker.talk.remote(i) for i, talker in enumerate(talkers)])
            if ray.__name__ == "ray":
                time.sleep(8)
            ray.shutdown()
            """
        ),
        log_to_driver=True, RAY_DEDUP_LOGS="1",
    )
    said = [line for line in everything(done).splitlines() if "hello from" in line]
    assert len(said) == 2 and "[repeated 3x across cluster]" in said[1], said
    assert len(re.findall(r"\) (?:0.0|1.5|3.0|4.5)\n", everything(done))) == 4


def test_no_escape_codes_where_there_is_no_terminal(run_driver):
    done = run_driver(drain(SCRIPT), log_to_driver=True, RAY_COLOR_PREFIX="0")
    assert "to stdout" in done.stdout and "\x1b" not in done.stdout + done.stderr


def test_odd_output(run_driver):
    done = run_driver(
        drain(
            """
            import os, sys, threading, subprocess
            ray.init(num_cpus=1, **INIT)

            @ray.remote
            def f():
                sys.stdout.buffer.write(b"raw \\xff\\xfe end\\n")
                print("x" * 10_000_000 + " long end")
                sys.stdout.write("0%\\r50%\\r100%\\n")
                sys.stdout.flush()
                subprocess.run(["echo", "from a child"])
                print("unfinished", end="")
                return sys.stdout.isatty(), sys.stdout.fileno(), sys.stdout.writable()

            assert ray.get(f.remote()) == (False, 1, True)
            ray.shutdown()
            """
        ),
        log_to_driver=True,
    )
    text = everything(done)
    for part in ("raw \ufffd\ufffd end", " long end", "100%", "from a child", "unfinished"):
        assert part in text, part


@pytest.mark.ray_differs("a worker of Ray's whose stdout a task has closed prints no more")
def test_a_task_that_closes_stdout_silences_no_other(run_driver):
    done = run_driver(
        """
        import sys
        ray.init(num_cpus=1, **INIT)
        ray.get(ray.remote(lambda: sys.stdout.close()).remote())
        ray.get(ray.remote(lambda: print("still there")).remote())
        ray.shutdown()
        """,
        log_to_driver=True,
    )
    assert "still there" in done.stdout


@pytest.mark.hpcray_only("Ray has a debugger to attach")
@pytest.mark.parametrize("call", ["breakpoint()", "__import__('pdb').set_trace()"])
def test_a_debugger_in_a_task_says_what_to_do(ray, call):
    @ray.remote
    def f():
        exec(call)

    with pytest.raises(ray.exceptions.RayTaskError, match=r"no terminal.*__wrapped__"):
        ray.get(f.remote())
