-- The tasks of one workflow: when each could run, began and ended.
-- $workflow: the workflow's id

WITH changes AS (
    SELECT s.task, s.name, s.pos AS submitted, c.*
    FROM task_submissions AS s
    JOIN task_changes AS c USING (task)
    WHERE s.workflow = (SELECT workflow FROM workflow_submissions WHERE id = $workflow)
        AND c.pos <= end_of(as_of())
),
needed AS (
    SELECT d.task, list(p.name ORDER BY p.task) AS names
    FROM task_dependencies AS d
    JOIN (SELECT DISTINCT task, name FROM changes) AS p ON p.task = d.depends_on
    GROUP BY d.task
)
SELECT
    c.name,
    max_by(state, pos) AS state,
    max(attempt) AS attempts,
    max_by(j.name, pos) FILTER (c.worker IS NOT NULL) AS worker,
    min(c.logged_at) AS submitted_at,
    min(c.logged_at) FILTER (state = 'ready') AS ready_at,
    min(coalesce(started_at, c.logged_at)) FILTER (attempt > 0) AS started_at,
    max(c.logged_at) FILTER (state IN ('completed', 'failed', 'skipped', 'cancelled')) AS ended_at,
    max_by(run_us, pos) AS run_us,
    max_by(error, pos) AS error,
    any_value(n.names) AS depends_on
FROM changes AS c
LEFT JOIN worker_joins AS j ON j.worker = c.worker
LEFT JOIN needed AS n ON n.task = c.task
GROUP BY c.task, c.name
ORDER BY min(coalesce(c.started_at, c.logged_at)) FILTER (attempt > 0) NULLS LAST, c.task;
