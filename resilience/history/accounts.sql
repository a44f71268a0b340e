-- What the time of a run went into, and one line for each run: read after views.sql, whose conventions hold here.

-- Where the time of a run went. Formulas, with t = seconds on the clock of the supervisor's events:
--   wall        = sum over attempts of (until_at - started_at)
--   running(g)  = stopped_at(g) - first_step_at(g)         stopped_at: last sign of life before its failure
--   productive  = sum over g of (running(g) - stall(g)) * kept_steps(g) / (end_step(g) - start_step(g))
--   recompute   = sum over g of (running(g) - stall(g)) - productive      steps done that a restore threw away
--   startup     = per attempt, its start to its first step or first failure, whichever came first
--   detect .. first_step = sums over incidents; of incidents that one generation recovered, which overlap,
--                 the one that failed first holds all of that time and is the only one summed
--   other       = wall - productive - all of the above      waiting, stopping, downtime of the supervisor
--   ETTR        = productive / wall        MTTR = mean of recovery_s over recovered incidents
CREATE TABLE ettr AS
WITH walls AS (
    SELECT run, sum(seconds(started_at, until_at)) AS wall_s FROM attempts GROUP BY run
), worked AS (
    SELECT run, sum(stall_s) AS stall_s,
        sum(CASE WHEN end_step > start_step
                 THEN greatest(0, running_s - stall_s) * kept_steps / (end_step - start_step) ELSE 0 END) AS productive_s,
        sum(CASE WHEN end_step > start_step
                 THEN greatest(0, running_s - stall_s) * (1 - kept_steps / (end_step - start_step)) ELSE 0 END)
            AS recompute_s
    FROM generations GROUP BY run
), first_steps AS (
    SELECT a.run, a.attempt, a.started_at, min(g.first_step_at) AS stepped_at
    FROM attempts a LEFT JOIN generations g
      ON g.run = a.run AND g.first_step_at >= a.started_at AND g.first_step_at <= a.until_at GROUP BY ALL
), first_failures AS (
    SELECT a.run, a.attempt, min(i.failed_at) AS failed_at FROM attempts a JOIN incidents i
      ON i.run = a.run AND i.failed_at >= a.started_at AND i.failed_at <= a.until_at GROUP BY ALL
), starting AS (
    SELECT s.run, sum(coalesce(seconds(s.started_at, least(coalesce(s.stepped_at, f.failed_at),
                                                           coalesce(f.failed_at, s.stepped_at))), 0)) AS startup_s
    FROM first_steps s LEFT JOIN first_failures f ON f.run = s.run AND f.attempt = s.attempt GROUP BY s.run
), down AS (
    SELECT run, sum(coalesce(detect_s, 0)) AS detect_s, sum(coalesce(decide_s, 0)) AS decide_s,
        sum(coalesce(fence_s, 0)) AS fence_s, sum(coalesce(start_s, 0)) AS start_s,
        sum(coalesce(restore_s, 0)) AS restore_s, sum(coalesce(first_step_s, 0)) AS first_step_s
    FROM (SELECT *, row_number() OVER (PARTITION BY run, recovered_by ORDER BY failed_at, incident) AS n FROM incidents
          WHERE recovered_at IS NOT NULL)
    WHERE n = 1 GROUP BY run
), counted AS (
    SELECT run, count(*) AS incidents, coalesce(sum(lost_steps), 0) AS lost_steps, avg(recovery_s) AS mttr_s,
           avg(detect_s) AS mttd_s
    FROM incidents GROUP BY run
), parts AS (
    SELECT w.run, w.wall_s, coalesce(k.productive_s, 0) AS productive_s, coalesce(s.startup_s, 0) AS startup_s,
        coalesce(d.detect_s, 0) AS detect_s, coalesce(d.decide_s, 0) AS decide_s, coalesce(d.fence_s, 0) AS fence_s,
        coalesce(d.start_s, 0) AS start_s, coalesce(d.restore_s, 0) AS restore_s,
        coalesce(d.first_step_s, 0) AS first_step_s, coalesce(k.recompute_s, 0) AS recompute_s,
        coalesce(k.stall_s, 0) AS stall_s, coalesce(c.incidents, 0) AS incidents,
        coalesce(c.lost_steps, 0) AS lost_steps, c.mttr_s, c.mttd_s
    FROM walls w LEFT JOIN worked k ON k.run = w.run LEFT JOIN starting s ON s.run = w.run
    LEFT JOIN down d ON d.run = w.run LEFT JOIN counted c ON c.run = w.run
)
SELECT *, wall_s - productive_s - startup_s - detect_s - decide_s - fence_s - start_s - restore_s - first_step_s
          - recompute_s - stall_s AS other_s,
       CASE WHEN wall_s > 0 THEN productive_s / wall_s END AS ettr
FROM parts;

-- The same as rows: one for each phase, with its share of the wall time.
CREATE VIEW lost_time AS
SELECT run, regexp_replace(phase, '_s$', '') AS phase, seconds, CASE WHEN wall_s > 0 THEN seconds / wall_s END AS share
FROM (UNPIVOT (SELECT run, wall_s, startup_s, detect_s, decide_s, fence_s, start_s, restore_s, first_step_s,
                      recompute_s, stall_s, other_s FROM ettr)
      ON startup_s, detect_s, decide_s, fence_s, start_s, restore_s, first_step_s, recompute_s, stall_s, other_s
      INTO NAME phase VALUE seconds);

-- One row for each run.
CREATE VIEW runs AS
WITH latest AS (
    SELECT run, max(attempt) AS attempts, min(started_at) AS started_at, arg_max(job, attempt) AS job,
        arg_max(entry, attempt) AS entry, arg_max(workers, attempt) AS workers, arg_max(spares, attempt) AS spares
    FROM attempts GROUP BY run
), ending AS (
    SELECT a.* FROM attempts a JOIN latest l ON l.run = a.run AND l.attempts = a.attempt
), finish AS (
    SELECT run, any_value(body ->> 'result') AS result, max(try_cast(body ->> 'step' AS BIGINT)) AS step
    FROM log WHERE kind = 'finish' AND NOT ignored GROUP BY run
), gens AS (
    SELECT run, count(*) AS generations, max(generation) AS generation,
           arg_max(end_step, generation) FILTER (end_step IS NOT NULL) AS reached FROM generations GROUP BY run
), newest AS (
    SELECT run, arg_max(step, (step, generation)) AS step, arg_max(tier, (step, generation, committed_at)) AS tier,
           max(committed_at) AS committed_at
    FROM checkpoints WHERE state = 'kept' GROUP BY run
), ages AS (SELECT run, max(time) AS last_event_at FROM events GROUP BY run)
SELECT f.run, f.url, l.job, l.entry, l.workers, l.spares,
    coalesce(z.result, e.result) AS result, e.reason, coalesce(z.step, e.steps, g.reached) AS steps,
    coalesce(l.attempts, 0) AS attempts, coalesce(g.generations, 0) AS generations,
    coalesce(t.incidents, 0) AS incidents, coalesce(t.lost_steps, 0) AS lost_steps,
    t.wall_s, t.ettr, t.mttr_s, e.digest,
    c.step AS checkpoint_step, c.tier AS checkpoint_tier,
    seconds(c.committed_at, (SELECT read_at FROM reading)) AS checkpoint_age_s,
    (SELECT count(*) FROM warnings w WHERE w.run = f.run) AS warnings,
    f.created AS created_at, l.started_at, e.finished_at, a.last_event_at
FROM found f
LEFT JOIN latest l ON l.run = f.run LEFT JOIN ending e ON e.run = f.run LEFT JOIN finish z ON z.run = f.run
LEFT JOIN gens g ON g.run = f.run LEFT JOIN newest c ON c.run = f.run LEFT JOIN ettr t ON t.run = f.run
LEFT JOIN ages a ON a.run = f.run;
