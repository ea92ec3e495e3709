-- How many tasks waited and ran, over time: at the end of each of equal stretches.
-- $buckets = 60: into how many stretches
-- $since = 0: begin after this position

WITH span AS (
    SELECT epoch_ms(min(logged_at) FILTER (seq > $since)) AS from_ms, epoch_ms(max(logged_at)) + 1 AS until_ms
    FROM frames
    WHERE seq <= as_of()
),
-- A cancelled task waited for a worker or for something else: the row before tells.
cancelled AS (
    SELECT c.task, c.pos, any_value(epoch_ms(c.logged_at)) AS at_ms, max_by(b.state, b.pos) AS state
    FROM task_changes AS c
    JOIN task_changes AS b ON b.task = c.task AND b.pos < c.pos
    WHERE c.state = 'cancelled' AND c.pos <= end_of(as_of())
    GROUP BY c.task, c.pos
),
steps AS (
    SELECT
        epoch_ms(logged_at) AS at_ms,
        -- Every step into a state is one out of another; its cause says out of which.
        (state = 'pending')::INTEGER
        - (state = 'skipped' OR (state = 'ready' AND run_us IS NULL AND cause IN ('task.completed', 'task.retried')))::INTEGER
            AS pending,
        (state = 'ready')::INTEGER
        - (cause = 'task.assigned' OR (state = 'failed' AND cause IN ('task.timed_out', 'task.quarantined')))::INTEGER
            AS ready,
        (cause = 'task.assigned')::INTEGER
        - (state != 'running' AND (run_us IS NOT NULL OR cause = 'task.declined' OR cause LIKE 'worker.%'))::INTEGER
            AS running
    FROM task_changes
    WHERE pos <= end_of(as_of())
    UNION ALL
    SELECT at_ms, -(state = 'pending')::INTEGER, -(state = 'ready')::INTEGER, -(state = 'running')::INTEGER
    FROM cancelled
),
counted AS (
    SELECT
        greatest(0, (at_ms - from_ms) * $buckets // (until_ms - from_ms)) AS bucket,
        sum(pending) AS pending,
        sum(ready) AS ready,
        sum(running) AS running
    FROM steps, span
    GROUP BY bucket
)
SELECT
    make_timestamp_ms((from_ms + (until_ms - from_ms) * (b.bucket + 1) // $buckets)::BIGINT) AS until_time,
    coalesce(sum(pending) OVER (ORDER BY b.bucket), 0)::BIGINT AS pending,
    coalesce(sum(ready) OVER (ORDER BY b.bucket), 0)::BIGINT AS ready,
    coalesce(sum(running) OVER (ORDER BY b.bucket), 0)::BIGINT AS running
FROM (SELECT range AS bucket FROM range($buckets)) AS b
LEFT JOIN counted USING (bucket), span
WHERE from_ms IS NOT NULL
ORDER BY b.bucket;
