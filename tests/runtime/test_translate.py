"""Every observation of a node, as the supervisor's event and the journal's line."""

import pytest

from resilience.cards.codes import FaultCodes
from resilience.control import events as e
from resilience.control.types import Card, CheckpointRef, Exit, RankProgress
from resilience.journal.event import TYPES
from resilience.runtime.translate import event_of, fault_of, line_of

REF = CheckpointRef(5, 1)
CODES = FaultCodes.over({})
OF = {"generation": 2, "rank": 3}
PAGE = {"step": 4, "section": "step", "age_s": 0.5, "state": "S", "stalled_s": 0.1}
EXITED = {
    "t": "exited",
    **OF,
    "code": None,
    "signal": 9,
    "told": {},
    "output": "tail",
    "step": 8,
    "condemned": False,
}
FAILED = {"t": "failed", "error": "E: x", "traceback": "tb", "signature": "E@f:1"}


@pytest.mark.parametrize(
    ("seen", "event"),
    [
        ({"t": "progress", **OF, "ranks": {"3": PAGE}}, e.Progress(1.0, 2, "n", {3: RankProgress(**PAGE)})),
        (
            {"t": "restored", **OF, "step": 5, "tier": "nvme", "seconds": 0.2},
            e.Restored(1.0, 2, 3, 5, "nvme", 0.2),
        ),
        ({"t": "sealed", **OF, "step": 6, "stall_s": 0.1, "size": 9}, e.Sealed(1.0, 2, 3, 6, 0.1, 9)),
        (
            {
                "t": "persisted",
                **OF,
                "step": 6,
                "tier": "shared",
                "part": "p",
                "sha256": "s",
                "size": 9,
                "seconds": 1.5,
            },
            e.Persisted(1.0, 2, 3, 6, "shared", "n", "p", "s", 9, 1.5),
        ),
        (
            {"t": "save_failed", **OF, "step": 6, "tier": "nvme", "error": "full"},
            e.SaveFailed(1.0, 2, 3, 6, "nvme", "full"),
        ),
        ({"t": "skipped", **OF, "step": 6, "reason": "busy"}, e.SaveFailed(1.0, 2, 3, 6, "memory", "busy")),
        ({"t": "missed", **OF, "wanted": 6, "step": 7}, e.CheckpointMissed(1.0, 2, 3, 6, 7)),
        ({"t": "parked", **OF, "step": 6}, e.Parked(1.0, 2, 3, 6)),
        (
            {"t": "finished", **OF, "steps": 9, "stopped": True, "value": "null"},
            e.RankFinished(1.0, 2, 3, 9, True),
        ),
        ({"t": "stopped", "generation": 2}, e.RanksStopped(1.0, 2, "n")),
        (
            {"t": "card", "index": 1, "code": "XID 79", "detail": "fell off", "affects": (2,)},
            e.CardFaulted(
                1.0,
                Card("n", 1),
                "79",
                "fell off",
                "replace node",
                "GPU has fallen off the bus",
                (Card("n", 2),),
            ),
        ),
        (
            {"t": "card", "index": 1, "code": "80C98008", "detail": "", "affects": ()},
            e.CardFaulted(1.0, Card("n", 1), "80C98008", "", "restart", "AI core multi-bit ECC", limit=2),
        ),
        (
            {"t": "card", "index": 1, "code": "DEADBEEF", "detail": "?", "affects": ()},
            e.CardFaulted(1.0, Card("n", 1), "DEADBEEF", "?", "watch"),
        ),
        (EXITED, e.RankExited(1.0, 2, 3, Exit(signal=9, output="tail"), 8)),
        (
            {**EXITED, "code": 1, "signal": None, "told": FAILED},
            e.RankExited(1.0, 2, 3, Exit(1, None, "E: x", "tb", "E@f:1", "tail"), 8),
        ),
    ],
    ids=lambda value: value.get("t") if isinstance(value, dict) else "",
)
def test_an_observation_is_its_event(seen, event):
    assert event_of("n", seen, 1.0, REF, CODES) == event


def test_an_exit_that_was_ordered_or_announced_is_no_news():
    assert event_of("n", {**EXITED, "condemned": True}, 1.0, REF, CODES) is None
    assert event_of("n", {**EXITED, "told": {"t": "finished"}}, 1.0, REF, CODES) is None


@pytest.mark.parametrize("corrupt", [True, False])
def test_an_exit_over_a_restore_blames_the_checkpoint(corrupt):
    told = {"t": "restore_failed", "tier": "shared", "reason": "bad bytes", "corrupt": corrupt}
    seen = {**EXITED, "code": 75, "signal": None, "told": told}
    assert event_of("n", seen, 1.0, REF, CODES) == e.RestoreFailed(
        1.0, 2, 3, REF, "shared", "bad bytes", corrupt
    )
    # Without anything to restore there is nothing to blame but the exit.
    assert isinstance(event_of("n", seen, 1.0, None, CODES), e.RankExited)


@pytest.mark.parametrize(
    ("seen", "type_", "subject"),
    [
        (
            {"t": "log", "rank": 3, "values": [{"step": 1, "loss": 2.0}]},
            "metrics.logged",
            {"node": "n", "rank": 3},
        ),
        ({"t": "warning", "message": "m"}, "warning.raised", {"node": "n", "severity": "warning"}),
        ({"t": "broken", "traceback": "tb"}, "warning.raised", {"node": "n", "severity": "error"}),
        ({"t": "retried", "data": {}}, "storage.retried", {"node": "n", "severity": "warning"}),
        ({"t": "deleted", "step": 4, "of": 2}, "checkpoint.deleted", {"node": "n", "step": 4}),
    ],
)
def test_what_is_only_story_is_a_line_and_no_event(seen, type_, subject):
    line = line_of("n", seen)
    assert (line[0], line[2]) == (type_, subject)
    assert type_ in TYPES
    assert event_of("n", seen, 1.0, None, CODES) is None


def test_what_control_journals_itself_is_no_line():
    for seen in (EXITED, {"t": "sealed", **OF}, {"t": "stopped", "generation": 1}):
        assert line_of("n", seen) is None


def test_a_reporter_may_choose_the_action_itself():
    seen = {
        "index": 0,
        "code": "80C98008",
        "detail": "d",
        "affects": (),
        "action": "replace card",
        "source": "ann",
    }
    assert fault_of("n", seen, 1.0, CODES) == e.CardFaulted(
        1.0,
        Card("n", 0),
        "80C98008",
        "d",
        "replace card",
        "AI core multi-bit ECC",
        certain=True,
        source="ann",
    )
