-- Tasks that have not ended, the oldest first.
-- $limit = 100: how many

WITH ended AS (
    SELECT task
    FROM task_changes
    WHERE state IN ('completed', 'failed', 'skipped', 'cancelled') AND pos <= end_of(as_of())
),
oldest AS (
    SELECT *
    FROM task_submissions AS s
    ANTI JOIN ended USING (task)
    WHERE s.pos <= end_of(as_of())
    ORDER BY s.task
    LIMIT $limit
),
latest AS (
    SELECT task, arg_max(c, c.pos) AS change
    FROM task_changes AS c
    WHERE task IN (SELECT task FROM oldest) AND pos <= end_of(as_of())
    GROUP BY task
)
SELECT
    o.id,
    o.runs,
    l.change.state AS state,
    l.change.logged_at AS since,
    j.name AS worker,
    l.change.attempt AS attempts,
    o.max_attempts,
    o.logged_at AS submitted_at,
    o.client
FROM oldest AS o
JOIN latest AS l USING (task)
LEFT JOIN worker_joins AS j ON j.worker = l.change.worker
ORDER BY o.task;
