-- What tells two histories apart: for each table and each stretch of 2^$shift positions from $low to
-- $high, how many rows there are, and a hash of them that does not depend on their order.
WITH located AS (
    SELECT 'frames' AS "table", seq, hash(t) AS digest FROM frames AS t
    UNION ALL SELECT 'decided', seq, hash(t) FROM decided AS t
    -- What is said of a message as a whole stands one before its first event.
    UNION ALL SELECT 'refusals', (pos + 1) >> 13, hash(t) FROM refusals AS t
    UNION ALL SELECT 'task_submissions', pos >> 13, hash(t) FROM task_submissions AS t
    UNION ALL
    SELECT 'task_dependencies', s.pos >> 13, hash(t)
    FROM task_dependencies AS t
    JOIN task_submissions AS s ON s.task = t.task
    UNION ALL SELECT 'task_changes', pos >> 13, hash(t) FROM task_changes AS t
    UNION ALL SELECT 'task_priorities', pos >> 13, hash(t) FROM task_priorities AS t
    UNION ALL SELECT 'task_cancels', pos >> 13, hash(t) FROM task_cancels AS t
    UNION ALL SELECT 'workflow_submissions', workflow >> 13, hash(t) FROM workflow_submissions AS t
    UNION ALL SELECT 'workflow_ends', pos >> 13, hash(t) FROM workflow_ends AS t
    UNION ALL SELECT 'worker_joins', worker, hash(t) FROM worker_joins AS t
    UNION ALL SELECT 'worker_changes', pos >> 13, hash(t) FROM worker_changes AS t
    UNION ALL SELECT 'elections', pos >> 13, hash(t) FROM elections AS t
    UNION ALL SELECT 'master_changes', pos >> 13, hash(t) FROM master_changes AS t
    UNION ALL SELECT 'lock_changes', pos >> 13, hash(t) FROM lock_changes AS t
    UNION ALL SELECT 'policies', pos >> 13, hash(t) FROM policies AS t
)
SELECT "table", seq >> $shift::INTEGER AS stretch, count(*) AS "rows", sum(digest)::VARCHAR AS digest
FROM located
WHERE seq BETWEEN $low AND $high
GROUP BY ALL
ORDER BY ALL
