from resilience.control.types import Phase, Result


def test_finishes(make_world):
    world = make_world()
    world.run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED


def test_kill(make_world):
    world = make_world()
    world.run_to_step(23)
    world.kill(2)
    world.run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED
    (rec,) = world.records("incident.recovered")
    print(rec)
    assert rec.data["lost_steps"] == 3
