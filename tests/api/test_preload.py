"""`init(preload=...)`: what nodes import once, and not every worker for itself."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.hpcray_only("Ray's workers import for themselves")


def test_auto_imports_what_the_driver_has(run_driver):
    """Of installed packages, and not the program's own files or the standard library."""
    pytest.importorskip("pandas")
    done = run_driver("""
        import pathlib, sys
        pathlib.Path(__file__).with_name("own_module.py").write_text("")
        import colorsys, own_module, pandas

        ray.init(num_cpus=1, preload="auto")
        NAMES = ["pandas", "pandas.core.frame", "own_module", "colorsys"]

        @ray.remote
        def first():
            import sys
            return [name for name in NAMES if name in sys.modules]

        assert ray.get(first.remote()) == ["pandas", "pandas.core.frame"]

        import iniconfig  # meanwhile

        @ray.remote(num_cpus=0)
        class Later:
            def look(self):
                import sys
                return "iniconfig" in sys.modules

        # More than there are workers by now.
        actors = [Later.remote() for _ in range(4)]
        assert ray.get(actors[-1].look.remote())
        print("all right")
    """)
    assert "all right" in done.stdout, done.stderr
    assert "preload" not in done.stderr


def test_auto_by_the_environment(run_driver):
    pytest.importorskip("pandas")
    done = run_driver("""
        import pandas

        @ray.remote
        def look():
            import sys
            return "pandas" in sys.modules

        assert ray.get(look.remote())
        print("all right")
    """, HPCRAY_PRELOAD="auto")
    assert "all right" in done.stdout, done.stderr


def test_by_name_and_what_cannot_be_is_named_once(run_driver):
    done = run_driver("""

        ray.init(num_cpus=2, preload=["iniconfig", "no_such_module"])

        @ray.remote
        def look():
            import sys
            return "iniconfig" in sys.modules

        assert all(ray.get([look.remote() for _ in range(10)]))
        ray.shutdown()
        ray.init(num_cpus=1)  # another job, without
        assert not ray.get(look.remote())
        print("all right")
    """)
    assert "all right" in done.stdout, done.stderr
    assert done.stderr.count("no_such_module is not preloaded: it cannot be imported") == 1


def test_a_module_that_starts_threads_is_left_to_workers(run_driver):
    done = run_driver("""
        import pathlib, sys
        folder = pathlib.Path(__file__).parent / "site-packages"
        folder.mkdir()
        (folder / "threaded.py").write_text(
            "import threading\\n"
            "threading.Thread(target=threading.Event().wait, daemon=True).start()")
        sys.path.append(str(folder))
        import threaded

        @ray.remote
        def use():
            import sys
            before = "threaded" in sys.modules
            import threaded
            return before, threaded.__name__

        for preload, told in (("auto", False), (["threaded"], True)):
            ray.init(num_cpus=1, preload=preload)
            assert ray.get(use.remote()) == (False, "threaded")
            ray.shutdown()
            print("auto" if preload == "auto" else "by name", file=sys.stderr, flush=True)
        print("all right")
    """)
    assert "all right" in done.stdout, done.stderr
    quiet, _, loud = done.stderr.partition("auto")
    assert "threaded" not in quiet
    assert loud.count("threaded is not preloaded: it starts 1 thread. Workers that need it") == 1


def test_packages_of_a_task_come_before_what_is_preloaded(run_driver):
    done = run_driver("""
        import pathlib
        folder = pathlib.Path(__file__).parent / "brought"
        folder.mkdir()
        (folder / "iniconfig").mkdir()
        (folder / "iniconfig" / "__init__.py").write_text("mine = True")
        import iniconfig

        @ray.remote
        def use():
            import iniconfig
            return hasattr(iniconfig, "mine")

        ray.init(num_cpus=1, preload="auto")
        assert ray.get(use.remote()) is False
        brought = {"py_modules": [str(folder / "iniconfig")]}
        assert ray.get(use.options(runtime_env=brought).remote()) is True
        print("all right")
    """)
    assert "all right" in done.stdout, done.stderr


def test_threads_of_a_library_by_the_tasks_environment(bare_ray, init_options):
    """As if the library had been loaded then."""
    bare_ray.init(num_cpus=1, **init_options)

    @bare_ray.remote
    def threads():
        from threadpoolctl import threadpool_info

        return {library["num_threads"] for library in threadpool_info()}

    more = threads.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "2"}})
    other = threads.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "2",
                                                      "OPENBLAS_NUM_THREADS": "3"}})
    assert bare_ray.get(threads.remote()) == {1}
    assert bare_ray.get(more.remote()) == {1}, "OPENBLAS_NUM_THREADS says one"
    assert bare_ray.get(other.remote()) == {3}
    assert bare_ray.get(threads.remote()) == {1}
