-- Why attempts failed, the most frequent first.
-- $since = 0: leave out what happened up to this position

SELECT
    c.error,
    split_part(c.detail, chr(10), 1)[:200] AS detail,
    s.runs,
    count(*) AS failures,
    count(DISTINCT c.task) AS tasks,
    count(*) FILTER (c.state = 'failed') AS given_up,
    min(c.logged_at) AS first_at,
    max(c.logged_at) AS last_at,
    max_by(s.id, c.pos) AS last_task
FROM task_changes AS c
JOIN task_submissions AS s USING (task)
WHERE c.error IS NOT NULL AND c.state != 'skipped' AND c.pos <= end_of(as_of()) AND c.pos > end_of($since)
GROUP BY ALL
ORDER BY failures DESC, last_at DESC
LIMIT 200;
