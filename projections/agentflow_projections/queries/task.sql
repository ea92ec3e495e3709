-- Everything that happened to one task, step by step.
-- $task: the task's id

WITH it AS (SELECT task FROM task_submissions WHERE id = $task),
steps AS (
    SELECT pos, logged_at, cause AS what, state::VARCHAR AS state, attempt, worker, run_us, error, detail
    FROM task_changes
    WHERE task = (SELECT task FROM it)
    UNION ALL BY NAME
    SELECT pos, logged_at, 'task.reprioritized' AS what, 'priority ' || priority AS detail
    FROM task_priorities
    WHERE task = (SELECT task FROM it)
    UNION ALL BY NAME
    SELECT pos, logged_at, 'cancel asked for' AS what, reason AS detail
    FROM task_cancels
    WHERE task = (SELECT task FROM it)
)
SELECT
    s.logged_at AS at_time,
    epoch_ms(s.logged_at) - epoch_ms(min(s.logged_at) OVER ()) AS since_ms,
    s.what,
    s.state,
    nullif(s.attempt, 0) AS attempt,
    j.name AS worker,
    s.run_us,
    s.error,
    s.detail,
    seq_of(s.pos) AS seq,
    index_of(s.pos) AS "index"
FROM steps AS s
LEFT JOIN worker_joins AS j ON j.worker = s.worker
WHERE s.pos <= end_of(as_of())
ORDER BY s.pos, s.state = 'ready', s.what;
