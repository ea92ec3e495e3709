-- What tasks wait for, and how long. Of very many tasks a sample is measured: one in `every`.
-- $since = 0: leave out what ended up to this position

WITH sample AS (SELECT greatest(1, max(task) // 100000)::UBIGINT AS every FROM task_submissions),
ended AS (SELECT epoch_ms(max(logged_at)) AS at_ms FROM frames WHERE seq <= as_of()),
steps AS (
    SELECT
        task,
        pos,
        state,
        cause,
        epoch_ms(logged_at) AS from_ms,
        lead(epoch_ms(logged_at)) OVER (PARTITION BY task ORDER BY pos) AS until_ms,
        lead(pos) OVER (PARTITION BY task ORDER BY pos) AS until_pos
    FROM task_changes
    WHERE hash(task) % (SELECT every FROM sample) = 0 AND pos <= end_of(as_of())
),
waits AS (
    SELECT
        CASE
            WHEN state = 'running' THEN 'its end, while running'
            WHEN state = 'ready' THEN 'a worker'
            WHEN cause = 'task.failed' THEN 'the next attempt'
            ELSE 'what it depends on'
        END AS waits_for,
        until_ms IS NULL AS open,
        coalesce(until_ms, (SELECT at_ms FROM ended)) - from_ms AS waited_ms
    FROM steps
    WHERE state IN ('pending', 'ready', 'running') AND coalesce(until_pos, end_of(as_of())) > end_of($since)
)
SELECT
    waits_for,
    count(*) AS waits,
    count(*) FILTER (open) AS still,
    round(sum(waited_ms) / 1000, 3) AS total_s,
    round(avg(waited_ms), 1) AS mean_ms,
    quantile_disc(waited_ms, 0.5) AS p50_ms,
    quantile_disc(waited_ms, 0.95) AS p95_ms,
    max(waited_ms) AS max_ms,
    (SELECT every FROM sample) AS every
FROM waits
GROUP BY waits_for
ORDER BY total_s DESC;
