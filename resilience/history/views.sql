-- What happened, as SQL. Tables (filled by database.py): found(run, url, created), events, log, warnings,
-- reading(read_at). Everything below is derived from them; docs/history.md describes each view.
-- Conventions: *_at are TIMESTAMPs in UTC, *_s are seconds, size is bytes. `step` of a metric is the index
-- of a step, counted from 0; `step` of a checkpoint or restore is the number of completed steps, so a
-- checkpoint of step 20 holds the effect of the steps 0..19. The commit log is believed before the journal:
-- the journal may have lost segments, the log may not.

-- What many others are derived from is a table: computed once, when the database is made.

-- Microseconds are exact; epoch() would round to a tenth of one.
CREATE MACRO seconds(earlier, later) AS date_diff('microsecond', earlier, later) / 1e6;

-- One row for each time a supervisor took the run up. Time between `finished_at` and the next start is
-- nobody's loss (the user had stopped it); a supervisor that died without `run.finished` is down until the
-- next one starts, and that counts.
CREATE TABLE attempts AS
WITH said AS (
    SELECT run, time, data FROM events WHERE type = 'run.started'
    UNION ALL  -- the segment that held run.started may be lost: then the first event is the best we know
    SELECT run, min(time), NULL FROM events GROUP BY run HAVING count(*) FILTER (type = 'run.started') = 0
), starts AS (
    SELECT run, time AS started_at, data,
           row_number() OVER (PARTITION BY run ORDER BY time) AS attempt,
           lead(time) OVER (PARTITION BY run ORDER BY time) AS next_started_at
    FROM said
), ends AS (
    SELECT f.run, s.attempt, min(f.time) AS finished_at,
           arg_min(f.data ->> 'result', f.time) AS result,
           arg_min(f.data ->> 'reason', f.time) AS reason,
           arg_min(try_cast(f.data ->> 'steps' AS BIGINT), f.time) AS steps,
           arg_min(f.data ->> 'digest', f.time) AS digest
    FROM (SELECT * FROM events WHERE type = 'run.finished') f
    ASOF JOIN starts s ON f.run = s.run AND f.time >= s.started_at
    GROUP BY ALL
), newest AS (SELECT run, max(time) AS last_event_at FROM events GROUP BY run)
SELECT s.run, s.attempt, s.started_at, e.finished_at, e.result, e.reason, e.steps, e.digest,
       coalesce(e.finished_at, s.next_started_at, n.last_event_at) AS until_at,
       s.data ->> 'job' AS job, s.data ->> 'entry' AS entry,
       try_cast(s.data ->> 'workers' AS INTEGER) AS workers, try_cast(s.data ->> 'spares' AS INTEGER) AS spares,
       s.data ->> 'nvme' AS nvme, s.data -> 'arguments' AS arguments
FROM starts s JOIN newest n ON n.run = s.run
LEFT JOIN ends e ON e.run = s.run AND e.attempt = s.attempt;

-- One row for each failure. The number before the '-' of its id is the generation that failed; events of the
-- recovery itself belong to the generation that recovered.
CREATE TABLE incidents AS
WITH told AS (
    SELECT run, data ->> 'incident' AS incident,
        min(time) FILTER (type = 'incident.detected') AS detected_at,
        min(time) FILTER (type = 'incident.decided') AS decided_at,
        max(time) FILTER (type = 'incident.recovered') AS recovered_at,
        max(generation) FILTER (type = 'incident.recovered') AS recovered_by,
        arg_max(data ->> 'kind', time) FILTER (type <> 'incident.decided') AS kind,
        arg_max(data ->> 'cause', time) FILTER (type <> 'incident.decided') AS cause,
        arg_max(try_cast(data ->> 'confidence' AS DOUBLE), time) FILTER (type <> 'incident.decided') AS confidence,
        arg_max(data ->> 'decision', time) FILTER (type <> 'incident.detected') AS decision,
        arg_max(data ->> 'reason', time) FILTER (type <> 'incident.detected') AS reason,
        arg_max(rank, time) AS rank, arg_max(node, time) AS node, arg_max(card, time) AS card,
        arg_max(try_cast(coalesce(data ->> 'step_failed', data ->> 'step') AS BIGINT), time)
            FILTER (type <> 'incident.decided') AS step_failed,
        any_value(data) FILTER (type = 'incident.recovered') AS story
    FROM events WHERE type IN ('incident.detected', 'incident.decided', 'incident.recovered')
    GROUP BY run, data ->> 'incident'
), timed AS (
    SELECT *,
        try_cast(split_part(incident, '-', 1) AS BIGINT) AS generation,
        try_cast(story ->> 'step_restored' AS BIGINT) AS step_restored,
        try_cast(story ->> 'lost_steps' AS BIGINT) AS lost_steps,
        story ->> 'tier' AS tier,
        try_cast(story ->> '$.phases.detect' AS DOUBLE) AS detect_s,
        try_cast(story ->> '$.phases.decide' AS DOUBLE) AS decide_s,
        try_cast(story ->> '$.phases.fence' AS DOUBLE) AS fence_s,
        try_cast(story ->> '$.phases.start' AS DOUBLE) AS start_s,
        try_cast(story ->> '$.phases.restore' AS DOUBLE) AS restore_s,
        try_cast(story ->> '$.phases.first_step' AS DOUBLE) AS first_step_s,
        story -> 'signals' AS signals
    FROM told
), summed AS (
    SELECT *, coalesce(detect_s, 0) + coalesce(decide_s, 0) + coalesce(fence_s, 0) + coalesce(start_s, 0)
              + coalesce(restore_s, 0) + coalesce(first_step_s, 0) AS phases_s
    FROM timed
)
SELECT i.run, i.incident, i.generation,
    CASE WHEN i.recovered_at IS NOT NULL THEN 'recovered'
         WHEN EXISTS (SELECT 1 FROM attempts a WHERE a.run = i.run AND a.started_at <= i.detected_at
                      AND a.finished_at >= i.detected_at) THEN 'final'       -- the run ended with it
         WHEN EXISTS (SELECT 1 FROM events r WHERE r.run = i.run AND r.type = 'incident.recovered'
                      AND r.time > i.detected_at) THEN 'superseded'          -- a later recovery covered it
         ELSE 'open' END AS state,
    i.kind, i.cause, i.confidence, i.rank, i.node, i.card, i.decision, i.reason,
    i.step_failed, i.step_restored, i.lost_steps, i.tier,
    i.detect_s, i.decide_s, i.fence_s, i.start_s, i.restore_s, i.first_step_s,
    CASE WHEN i.recovered_at IS NOT NULL THEN i.phases_s END AS recovery_s,
    CASE WHEN i.recovered_at IS NOT NULL THEN i.recovered_at - to_microseconds(CAST(i.phases_s * 1e6 AS BIGINT))
         ELSE i.detected_at END AS failed_at,
    i.detected_at, i.decided_at, i.recovered_at, i.recovered_by, i.signals
FROM summed i;

-- One row for each generation that won a fence or left a trace.
CREATE TABLE generations AS
WITH names AS (
    SELECT run, generation FROM log WHERE kind = 'fence'
    UNION SELECT run, generation FROM events WHERE generation > 0
), fences AS (
    SELECT run, generation, min(slot) AS slot FROM log WHERE kind = 'fence' GROUP BY ALL
), told AS (
    SELECT run, generation,
        min(time) FILTER (type = 'generation.fenced') AS fenced_at,
        max(try_cast(data ->> 'seconds' AS DOUBLE)) FILTER (type = 'generation.fenced') AS fence_s,
        min(time) FILTER (type = 'generation.started') AS started_at,
        max(try_cast(data ->> 'world_size' AS INTEGER)) FILTER (type = 'generation.started') AS world_size,
        max(try_cast(data ->> '$.restore.step' AS BIGINT)) FILTER (type = 'generation.started') AS wanted_step,
        max(try_cast(data ->> '$.restore.generation' AS BIGINT)) FILTER (type = 'generation.started')
            AS restore_generation,
        max(data ->> '$.restore.tier') FILTER (type = 'generation.started') AS restore_tier,
        max(data ->> 'attempt_of_incident') FILTER (type = 'generation.started') AS attempt_of_incident,
        max(step) FILTER (type = 'restore.done') AS restored_step,
        max(time) FILTER (type = 'restore.done') AS restored_at,
        max(time) FILTER (type = 'generation.ended') AS ended_at,
        arg_max(data ->> 'reason', time) FILTER (type = 'generation.ended') AS reason,
        max(try_cast(data ->> 'steps' AS BIGINT)) FILTER (type = 'generation.ended') AS ended_step,
        max(time) AS last_event_at
    FROM events GROUP BY run, generation
), seen AS (  -- how far it got, when generation.ended is missing: it still runs, or its supervisor died
    SELECT run, generation, max(reached) AS reached FROM (
        SELECT run, generation, 1 + try_cast(unnest(CAST(data -> 'values' AS JSON[])) ->> 'step' AS BIGINT) AS reached
        FROM events WHERE type = 'metrics.logged'
        UNION ALL SELECT run, generation, step FROM events WHERE type IN ('checkpoint.sealed', 'checkpoint.committed')
        UNION ALL SELECT run, generation, step_failed FROM incidents
    ) GROUP BY ALL
), failures AS (
    SELECT run, generation, count(*) AS incidents, min(failed_at) AS failed_at,
        arg_max(cause, detected_at) AS cause
    FROM incidents GROUP BY ALL
), recoveries AS (
    SELECT run, recovered_by AS generation, min(recovered_at) AS recovered_at FROM incidents
    WHERE recovered_at IS NOT NULL GROUP BY ALL
), stalls AS (
    SELECT run, generation, sum(stall_s) AS stall_s FROM (  -- ranks wait side by side: the longest counts
        SELECT run, generation, step, max(try_cast(data ->> 'stall_s' AS DOUBLE)) AS stall_s FROM events
        WHERE type IN ('checkpoint.sealed', 'checkpoint.committed') GROUP BY ALL
    ) GROUP BY ALL
), joined AS (
    SELECT n.run, n.generation, f.slot AS fence_slot, t.fenced_at, t.fence_s, t.started_at, t.world_size,
        CASE WHEN t.started_at IS NOT NULL OR t.restored_at IS NOT NULL
             THEN coalesce(t.restored_step, t.wanted_step, 0) END AS start_step,
        t.restore_generation, t.restore_tier, t.attempt_of_incident, t.restored_at,
        coalesce(r.recovered_at, t.restored_at) AS first_step_at,
        -- what a generation was ended for may be blamed better later: the incident has the last word
        t.ended_at, coalesce(x.cause, t.reason) AS reason, coalesce(t.ended_step, s.reached) AS reached_step,
        coalesce(x.incidents, 0) AS incidents,
        least(coalesce(x.failed_at, t.ended_at, t.last_event_at), coalesce(t.ended_at, t.last_event_at))
            AS stopped_at,
        coalesce(w.stall_s, 0) AS stall_s
    FROM names n
    LEFT JOIN fences f ON f.run = n.run AND f.generation = n.generation
    LEFT JOIN told t ON t.run = n.run AND t.generation = n.generation
    LEFT JOIN seen s ON s.run = n.run AND s.generation = n.generation
    LEFT JOIN failures x ON x.run = n.run AND x.generation = n.generation
    LEFT JOIN recoveries r ON r.run = n.run AND r.generation = n.generation
    LEFT JOIN stalls w ON w.run = n.run AND w.generation = n.generation
), bounded AS (
    SELECT *,
        CASE WHEN start_step IS NOT NULL THEN greatest(start_step, coalesce(reached_step, start_step)) END AS end_step,
        -- a later generation that began at step r threw away every step from r on
        min(start_step) OVER (PARTITION BY run ORDER BY generation ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)
            AS undone_from,
        CASE WHEN first_step_at IS NOT NULL THEN greatest(0, seconds(first_step_at, stopped_at)) END AS running_s
    FROM joined
)
SELECT run, generation, fence_slot, fenced_at, fence_s, started_at, restored_at, first_step_at, ended_at, stopped_at,
    world_size, start_step, end_step,
    CASE WHEN start_step IS NOT NULL
         THEN greatest(0, least(end_step, coalesce(undone_from, end_step)) - start_step) END AS kept_steps,
    restore_generation, restore_tier, attempt_of_incident, incidents, reason, running_s, stall_s
FROM bounded;

-- One row for each checkpoint and tier that the commit log records (or, with a damaged log, the journal tells).
CREATE TABLE checkpoints AS
WITH logged AS (
    SELECT run, coalesce(try_cast(body ->> 'generation' AS BIGINT), generation) AS generation,
           CAST(body ->> 'step' AS BIGINT) AS step, body ->> 'tier' AS tier,
           max(try_cast(body ->> 'world_size' AS INTEGER)) AS world_size,
           max(try_cast(body ->> 'size' AS BIGINT)) AS size, max(slot) AS slot
    FROM log WHERE kind = 'checkpoint' AND NOT ignored GROUP BY ALL
), told AS (
    SELECT run, coalesce(try_cast(data ->> 'generation' AS BIGINT), generation) AS generation, step,
           data ->> 'tier' AS tier, max(try_cast(data ->> 'size' AS BIGINT)) AS size, max(try_cast(data ->> 'slot' AS BIGINT)) AS slot,
           max(try_cast(data ->> 'stall_s' AS DOUBLE)) AS stall_s,
           max(try_cast(data ->> 'durable_s' AS DOUBLE)) AS durable_s, min(time) AS committed_at
    FROM events WHERE type = 'checkpoint.committed' GROUP BY ALL
), retired AS (
    SELECT DISTINCT run, CAST(ref ->> 'step' AS BIGINT) AS step, CAST(ref ->> 'generation' AS BIGINT) AS generation
    FROM (SELECT run, unnest(CAST(body -> 'refs' AS JSON[])) AS ref FROM log WHERE kind = 'retire' AND NOT ignored)
), quarantined AS (
    SELECT run, CAST(body ->> 'step' AS BIGINT) AS step, CAST(body ->> 'generation' AS BIGINT) AS generation,
           body ->> 'tier' AS tier, any_value(body ->> 'reason') AS reason
    FROM log WHERE kind = 'quarantine' AND NOT ignored GROUP BY ALL
), deleted AS (
    SELECT run, step, CAST(data ->> 'generation' AS BIGINT) AS generation, data ->> 'tier' AS tier,
           max(time) AS deleted_at
    FROM events WHERE type = 'checkpoint.deleted' GROUP BY ALL
), paired AS (
    SELECT coalesce(l.run, t.run) AS run, coalesce(l.step, t.step) AS step,
           coalesce(l.generation, t.generation) AS generation, coalesce(l.tier, t.tier) AS tier,
           coalesce(l.slot, t.slot) AS slot, l.slot IS NOT NULL AS in_log, l.world_size,
           coalesce(l.size, t.size) AS size, t.stall_s, t.durable_s, t.committed_at
    FROM logged l FULL OUTER JOIN told t
      ON t.run = l.run AND t.generation = l.generation AND t.step = l.step AND t.tier = l.tier
)
SELECT p.run, p.step, p.generation, p.tier,
    CASE WHEN d.deleted_at IS NOT NULL THEN 'deleted' WHEN r.run IS NOT NULL THEN 'retired'
         WHEN q.run IS NOT NULL THEN 'quarantined' ELSE 'kept' END AS state,
    q.reason, p.slot, p.in_log, p.world_size, p.size, p.stall_s, p.durable_s, p.committed_at,
    seconds(p.committed_at, (SELECT read_at FROM reading)) AS age_s, d.deleted_at
FROM paired p
LEFT JOIN retired r ON r.run = p.run AND r.step = p.step AND r.generation = p.generation
LEFT JOIN quarantined q ON q.run = p.run AND q.step = p.step AND q.generation = p.generation AND q.tier = p.tier
LEFT JOIN deleted d ON d.run = p.run AND d.step = p.step AND d.generation = p.generation AND d.tier = p.tier;

-- Saves that did not become a checkpoint.
CREATE VIEW failed_saves AS
SELECT run, generation, time AS failed_at, step, rank, data ->> 'tier' AS tier,
    CASE type WHEN 'checkpoint.failed' THEN 'failed' ELSE 'abandoned' END AS outcome,
    coalesce(data ->> 'error', data ->> 'reason') AS reason,
    try_cast(data ->> 'last_good_step' AS BIGINT) AS last_good_step,
    try_cast(data ->> 'last_good_age_s' AS DOUBLE) AS last_good_age_s
FROM events WHERE type IN ('checkpoint.failed', 'checkpoint.abandoned');

-- One row for each generation that began from something: what was chosen, what was passed over and why.
CREATE VIEW restores AS
SELECT run, generation,
    max(time) FILTER (type = 'restore.done') AS restored_at,
    coalesce(max(step) FILTER (type = 'restore.done'), arg_max(step, time) FILTER (type = 'restore.chosen')) AS step,
    coalesce(arg_max(data ->> 'tier', time) FILTER (type = 'restore.done'),
             arg_max(data ->> 'tier', time) FILTER (type = 'restore.chosen')) AS tier,
    arg_max(try_cast(data ->> 'generation' AS BIGINT), time) FILTER (type = 'restore.chosen') AS written_by,
    count(DISTINCT rank) FILTER (type = 'restore.done') AS ranks,
    max(try_cast(data ->> 'seconds' AS DOUBLE)) FILTER (type = 'restore.done') AS slowest_s,
    count(*) FILTER (type = 'restore.skipped') AS skipped,
    list('step ' || coalesce(CAST(step AS VARCHAR), '?') || ' in ' || coalesce(data ->> 'tier', '?') || ': '
         || coalesce(data ->> 'reason', '?') ORDER BY time, seq)
        FILTER (type IN ('restore.skipped', 'restore.failed')) AS reasons
FROM events WHERE type IN ('restore.chosen', 'restore.skipped', 'restore.done', 'restore.failed')
GROUP BY run, generation;

-- One row for each rank of each generation: where it ran and how it ended.
CREATE VIEW ranks AS
WITH placed AS (
    SELECT run, generation, time AS started_at, CAST(r ->> 'rank' AS INTEGER) AS rank, r ->> 'node' AS node,
        CASE WHEN contains(r ->> 'card', '/') THEN r ->> 'card' ELSE (r ->> 'node') || '/' || (r ->> 'card') END AS card
    FROM (SELECT run, generation, time, unnest(CAST(data -> 'ranks' AS JSON[])) AS r FROM events
          WHERE type = 'generation.started')
), gone AS (
    SELECT run, generation, rank, max(time) AS exited_at,
        arg_max(try_cast(data ->> 'code' AS INTEGER), time) AS code,
        arg_max(try_cast(data ->> 'signal' AS INTEGER), time) AS signal,
        arg_max(data ->> 'error', time) AS error, arg_max(data ->> 'output', time) AS output
    FROM events WHERE type = 'rank.exited' GROUP BY ALL
)
SELECT coalesce(p.run, g.run) AS run, coalesce(p.generation, g.generation) AS generation,
    coalesce(p.rank, g.rank) AS rank, p.node, p.card, p.started_at, g.exited_at, g.code, g.signal,
    nullif(g.error, '') AS error, nullif(g.output, '') AS output
FROM placed p FULL OUTER JOIN gone g ON g.run = p.run AND g.generation = p.generation AND g.rank = p.rank;

-- One row for each node: when it came and went, and how often it was to blame.
CREATE VIEW nodes AS
WITH told AS (
    SELECT run, node, min(time) FILTER (type = 'node.joined') AS joined_at,
        max(time) FILTER (type = 'node.joined') AS rejoined_at,
        max(time) FILTER (type = 'node.lost') AS lost_at,
        arg_max(data ->> 'reason', time) FILTER (type = 'node.lost') AS lost_reason,
        arg_max(try_cast(data ->> 'cards' AS INTEGER), time) FILTER (type = 'node.joined') AS cards,
        arg_max(data ->> 'host', time) FILTER (type = 'node.joined') AS host,
        arg_max(data -> 'levels', time) FILTER (type = 'node.joined') AS levels,
        count(*) FILTER (type = 'card.faulted') AS card_faults
    FROM events WHERE node IS NOT NULL AND type IN ('node.joined', 'node.lost', 'card.faulted') GROUP BY ALL
), blamed AS (
    SELECT run, coalesce(node, split_part(card, '/', 1)) AS node, count(*) AS failures FROM incidents GROUP BY ALL
)
SELECT t.run, t.node,
    CASE WHEN t.lost_at >= coalesce(t.rejoined_at, t.lost_at) THEN 'lost'
         WHEN t.rejoined_at < s.started_at THEN 'gone'  -- of an earlier attempt, not seen in this one
         ELSE 'up' END AS state,
    t.cards, t.host, t.levels, coalesce(b.failures, 0) AS failures, t.card_faults, t.joined_at, t.lost_at, t.lost_reason
FROM told t LEFT JOIN blamed b ON b.run = t.run AND b.node = t.node
LEFT JOIN (SELECT run, max(started_at) AS started_at FROM attempts GROUP BY run) s ON s.run = t.run;

-- One row for each card: in use, spare, failed or lost with its node, and how often it was to blame.
CREATE VIEW cards AS
WITH names AS (
    SELECT run, node, node || '/' || unnest(range(cards)) AS card FROM nodes WHERE cards IS NOT NULL
    UNION SELECT run, node, card FROM ranks WHERE card IS NOT NULL
    UNION SELECT run, coalesce(node, split_part(card, '/', 1)), card FROM events WHERE type = 'card.faulted' AND card IS NOT NULL
), faults AS (
    SELECT run, card, count(*) AS faults, max(time) AS last_fault_at, arg_max(data ->> 'code', time) AS last_code
    FROM events WHERE type = 'card.faulted' GROUP BY ALL
), hit AS (  -- what puts a card out of use: its own fault, or that of the other die of the same card
    SELECT run, card, time FROM events WHERE type = 'card.faulted'
        AND coalesce(data ->> 'action', 'replace card') IN ('reset', 'replace card', 'replace node')
    UNION ALL SELECT run, unnest(CAST(data -> 'affects' AS VARCHAR[])), time FROM events WHERE type = 'card.faulted'
        AND data ->> 'action' IN ('reset', 'replace card', 'replace node')
), cleared AS (
    SELECT run, card, max(time) AS cleared_at FROM events WHERE type = 'card.cleared' GROUP BY ALL
), out AS (
    SELECT h.run, h.card, max(h.time) AS out_at FROM hit h LEFT JOIN cleared k ON k.run = h.run AND k.card = h.card
    WHERE k.cleared_at IS NULL OR h.time > k.cleared_at GROUP BY ALL
), blamed AS (
    SELECT run, card, count(*) AS failures FROM incidents WHERE card IS NOT NULL GROUP BY ALL
), used AS (
    SELECT run, card, count(DISTINCT generation) AS generations, max(generation) AS last_generation FROM ranks GROUP BY ALL
), newest AS (
    SELECT run, max(generation) AS generation FROM generations WHERE started_at IS NOT NULL GROUP BY run
)
SELECT c.run, c.card, c.node,
    CASE WHEN n.state IN ('lost', 'gone') THEN n.state WHEN o.out_at >= s.started_at THEN 'failed'
         WHEN u.last_generation = g.generation THEN 'active' ELSE 'spare' END AS state,
    coalesce(u.generations, 0) AS generations, coalesce(b.failures, 0) AS failures, coalesce(f.faults, 0) AS faults,
    f.last_code, f.last_fault_at
FROM names c
LEFT JOIN nodes n ON n.run = c.run AND n.node = c.node
LEFT JOIN faults f ON f.run = c.run AND f.card = c.card
LEFT JOIN out o ON o.run = c.run AND o.card = c.card
LEFT JOIN blamed b ON b.run = c.run AND b.card = c.card
LEFT JOIN used u ON u.run = c.run AND u.card = c.card
LEFT JOIN newest g ON g.run = c.run
LEFT JOIN (SELECT run, max(started_at) AS started_at FROM attempts GROUP BY run) s ON s.run = c.run;

-- Every value that was ever logged, also by generations whose steps were undone.
CREATE VIEW metrics_all AS
WITH entries AS (
    SELECT run, generation, coalesce(rank, 0) AS rank, time, seq, unnest(CAST(data -> 'values' AS JSON[])) AS entry,
           generate_subscripts(CAST(data -> 'values' AS JSON[]), 1) AS place
    FROM events WHERE type = 'metrics.logged'
), named AS (
    SELECT run, generation, rank, time, seq, place, try_cast(entry ->> 'step' AS BIGINT) AS step,
           unnest(json_keys(entry)) AS name, entry
    FROM entries
), final AS (  -- logged twice in one step: the last word counts
    SELECT run, generation, rank, step, name, max(time) AS logged_at,
           arg_max(try_cast(json_extract_string(entry, '$."' || name || '"') AS DOUBLE), (seq, place)) AS value
    FROM named WHERE name <> 'step' AND step IS NOT NULL GROUP BY ALL
)
SELECT f.run, f.generation, f.rank, f.step, f.name, f.value, f.logged_at,
    NOT EXISTS (SELECT 1 FROM generations g WHERE g.run = f.run AND g.generation > f.generation
                AND g.start_step <= f.step) AS kept
FROM final f;

-- The loss curve as the finished model saw it: for each step the value of the newest generation that logged it,
-- without steps that a restore undid; where several ranks logged, the lowest rank's.
CREATE VIEW metrics AS
WITH best AS (
    SELECT run, step, name, arg_max(value, (generation, -rank)) AS value, max(generation) AS generation,
           arg_max(rank, (generation, -rank)) AS rank
    FROM metrics_all WHERE kept GROUP BY ALL
)
SELECT run, step, max(generation) AS generation, min(rank) AS rank, max(value) FILTER (name = 'loss') AS loss,
       json_group_object(name, value) AS "values"
FROM best GROUP BY run, step;

-- Which generation produced the surviving result of a step (index from 0).
CREATE VIEW lineage AS
SELECT run, unnest(range(start_step, start_step + kept_steps)) AS step, generation FROM generations WHERE kept_steps > 0;

-- Injected faults and the first incident detected after each.
CREATE VIEW chaos AS
SELECT c.run, c.generation, c.time AS injected_at, c.data ->> 'fault' AS fault, c.data ->> 'point' AS point,
    c.data ->> 'target' AS target, try_cast(c.data ->> 'plan_index' AS INTEGER) AS plan_index,
    c.rank, c.node, c.card, c.step,
    (SELECT arg_min(i.incident, i.detected_at) FROM incidents i WHERE i.run = c.run AND i.detected_at >= c.time)
        AS next_incident
FROM events c WHERE c.type = 'chaos.injected';
