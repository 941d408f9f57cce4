"""`cancel` of what runs: the tasks and calls below it, and retries that must not follow."""

from __future__ import annotations

import pytest


@pytest.fixture
def note(tmp_path):
    """`note(word)` in any process; `note.words()` in the test."""
    path = tmp_path / "notes"
    path.touch()

    def note(word, path=str(path)):
        with open(path, "a") as out:
            out.write(word + "\n")

    note.words = lambda: path.read_text().split()
    return note


@pytest.fixture
def until_told(tmp_path):
    """What runs, interruptible at any time, until `until_told.tell()`."""
    path = tmp_path / "told"

    def until_told(stop=lambda: False, path=str(path)):
        import os
        import time

        while not os.path.exists(path) and not stop():
            time.sleep(0.005)

    until_told.tell = path.touch
    return until_told


@pytest.fixture
def child(note, until_told):
    """A function that runs until it is told to finish, and notes what became of it."""
    run, note_ = until_told.__call__, note.__call__

    def child():
        try:
            note_("began")
            run()
        except KeyboardInterrupt:
            note_("interrupted")
            raise
        note_("finished")

    return child


def assert_cancelled(ray, ref):
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref, timeout=20)


@pytest.fixture
def make_parent(ray):
    """A task that submits, and runs on without waiting for what it submitted."""
    def make_parent(submit):
        @ray.remote
        def parent(*args):
            import time

            ref = submit(*args)
            while True:
                time.sleep(0.005)
                assert ref is not None

        return parent

    return make_parent


@pytest.mark.parametrize("options", [{"recursive": True}, {}], ids=["asked", "default"])
def test_a_running_child_is_cancelled(ray, make_parent, child, note, eventually, options):
    child = ray.remote(child)
    ref = make_parent(lambda: child.remote()).remote()
    eventually(lambda: note.words() == ["began"])
    ray.cancel(ref, **options)
    assert_cancelled(ray, ref)
    eventually(lambda: note.words() == ["began", "interrupted"])


def test_a_running_child_is_left_alone_if_asked(
    ray, make_parent, child, note, until_told, eventually
):
    child = ray.remote(child)
    ref = make_parent(lambda: child.remote()).remote()
    eventually(lambda: note.words() == ["began"])
    ray.cancel(ref, recursive=False)
    assert_cancelled(ray, ref)
    assert ray.get(ray.remote(lambda: 1).remote(), timeout=20) == 1
    assert note.words() == ["began"]
    until_told.tell()
    eventually(lambda: note.words() == ["began", "finished"])


def test_a_running_grandchild_is_cancelled(ray, child, note, eventually):
    grandchild = ray.remote(child)
    waits = ray.remote(lambda: ray.get(grandchild.remote()))
    ref = ray.remote(lambda: ray.get(waits.remote())).remote()
    eventually(lambda: note.words() == ["began"])
    ray.cancel(ref, recursive=True)
    assert_cancelled(ray, ref)
    eventually(lambda: note.words() == ["began", "interrupted"])


@pytest.mark.parametrize("recursive", [True, False])
def test_a_running_call_of_an_async_actor(ray, make_parent, note, eventually, recursive):
    note_ = note.__call__

    @ray.remote(num_cpus=0)
    class A:
        def __init__(self):
            import asyncio

            self.event = asyncio.Event()

        async def wait(self):
            import asyncio

            note_("began")
            try:
                await self.event.wait()
            except asyncio.CancelledError:
                note_("cancelled")
                raise
            note_("finished")

        async def release(self):
            self.event.set()

    actor = A.remote()
    ref = make_parent(lambda actor: actor.wait.remote()).remote(actor)
    eventually(lambda: note.words() == ["began"])
    ray.cancel(ref, recursive=recursive)
    assert_cancelled(ray, ref)
    if recursive:
        eventually(lambda: note.words() == ["began", "cancelled"])
    else:
        ray.get(actor.release.remote(), timeout=20)
        eventually(lambda: note.words() == ["began", "finished"])


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_running_call_of_a_plain_actor(
    ray, make_parent, note, until_told, eventually, recursive, concurrency
):
    run, note_ = until_told.__call__, note.__call__

    @ray.remote(num_cpus=0, max_concurrency=concurrency)
    class A:
        def wait(self):
            note_("began")
            here = ray.get_runtime_context()
            run(here.is_canceled)
            note_("cancelled" if here.is_canceled() else "finished")

    actor = A.remote()
    ref = make_parent(lambda actor: actor.wait.remote()).remote(actor)
    eventually(lambda: note.words() == ["began"])
    ray.cancel(ref, recursive=recursive)
    assert_cancelled(ray, ref)
    if recursive:
        eventually(lambda: note.words() == ["began", "cancelled"])
    else:
        until_told.tell()
        eventually(lambda: note.words() == ["began", "finished"])


# --- retries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [KeyboardInterrupt, ValueError])
def test_a_cancelled_task_is_not_retried(ray, until_told, counter, eventually, raises):
    run, add = until_told.__call__, counter.add

    @ray.remote(max_retries=3, retry_exceptions=True)
    def f():
        try:
            add()
            run()
        except KeyboardInterrupt:
            raise raises("ended early") from None

    ref = f.remote()
    eventually(lambda: counter.value == 1)
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(ref, timeout=20)
    done = [ray.remote(lambda: 1).remote() for _ in range(4)]
    assert ray.get(done, timeout=20) == [1] * 4
    assert counter.value == 1


def test_a_task_cancelled_by_force_is_not_retried(ray, until_told, counter, eventually):
    run, add = until_told.__call__, counter.add

    @ray.remote(max_retries=3, retry_exceptions=True)
    def f():
        add()
        run()

    ref = f.remote()
    eventually(lambda: counter.value == 1)
    ray.cancel(ref, force=True)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        ray.get(ref, timeout=20)
    done = [ray.remote(lambda: 1).remote() for _ in range(4)]
    assert ray.get(done, timeout=20) == [1] * 4
    assert counter.value == 1


@pytest.mark.parametrize("how", [
    pytest.param("sleeps", marks=pytest.mark.ray_differs("there a sleep is slept to its end")),
    "gets", "waits",
])
def test_what_a_task_waits_in_is_interrupted(ray, note, until_told, child, how, eventually):
    child_ = child

    note_ = note.__call__

    @ray.remote(num_cpus=0)
    def parent():
        import time

        note_("parent began")
        if how == "sleeps":
            time.sleep(60)
        ref = ray.remote(num_cpus=0)(child_).remote()
        if how == "gets":
            ray.get(ref)
        ray.wait([ref])

    ref = parent.remote()
    eventually(note.words)
    ray.cancel(ref)
    assert_cancelled(ray, ref)
    until_told.tell()


def test_a_task_that_no_node_can_run(ray):
    ref = ray.remote(num_cpus=1000)(lambda: None).remote()
    ray.cancel(ref)
    assert_cancelled(ray, ref)


def test_finally_runs(ray, note, until_told, eventually):
    run, note_ = until_told.__call__, note.__call__

    @ray.remote
    def f():
        try:
            note_("began")
            run()
        finally:
            note_("left")

    ref = f.remote()
    eventually(note.words)
    ray.cancel(ref)
    assert_cancelled(ray, ref)
    assert note.words() == ["began", "left"]


def test_whoever_has_the_ref_may_cancel(ray, note, child, until_told, eventually):
    ref = ray.remote(child).remote()
    eventually(note.words)

    @ray.remote
    def borrower(refs):
        ray.cancel(refs[0])

    ray.get(borrower.remote([ref]))
    assert_cancelled(ray, ref)
    until_told.tell()


def test_every_return_is_cancelled_and_so_is_what_needs_one(
    ray, note, child, until_told, eventually
):
    one, two = ray.remote(num_returns=2)(child).remote()
    later = ray.remote(lambda value: value).remote(one)
    last = ray.remote(lambda value: value).remote(later)
    eventually(note.words)
    ray.cancel(two)
    for ref in (one, two, later, last):
        assert_cancelled(ray, ref)
    assert len(ray.wait([one, last], num_returns=2, timeout=10)[0]) == 2, "they are ready"
    until_told.tell()


@pytest.mark.parametrize("wrong", [1, None, "x", []])
def test_only_refs_are_cancelled(ray, wrong):
    with pytest.raises(TypeError):
        ray.cancel(wrong)
