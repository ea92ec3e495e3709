-- What each worker did, and which part of its slots was busy.
-- $since = 0: leave out what ended up to this position

WITH range AS (
    SELECT max(logged_at) AS until, max(logged_at) FILTER (seq <= $since) AS since FROM frames WHERE seq <= as_of()
),
done AS (
    SELECT
        worker,
        count(*) AS attempts,
        count(*) FILTER (state = 'completed') AS completed,
        count(*) FILTER (error IS NOT NULL) AS failed,
        sum(run_us) AS busy_us,
        max(run_us) AS longest_us
    FROM task_changes
    WHERE run_us IS NOT NULL AND pos <= end_of(as_of()) AND pos > end_of($since)
    GROUP BY worker
),
lived AS (
    SELECT *, epoch_ms(coalesce(ended_at, r.until)) - epoch_ms(greatest(joined_at, coalesce(r.since, joined_at))) AS lived_ms
    FROM workers, range AS r
)
SELECT
    l.name,
    l.incarnation,
    l.state,
    l.slots,
    coalesce(d.attempts, 0) AS attempts,
    coalesce(d.completed, 0) AS completed,
    coalesce(d.failed, 0) AS failed,
    round(coalesce(d.busy_us, 0) / 1e6, 3) AS busy_s,
    round(l.lived_ms / 1000, 3) AS lived_s,
    round(coalesce(d.busy_us, 0) / 10.0 / nullif(l.lived_ms * l.slots, 0), 1) AS busy_percent,
    round(d.busy_us / 1000 / d.attempts, 1) AS mean_ms,
    round(d.longest_us / 1000, 1) AS longest_ms
FROM lived AS l
LEFT JOIN done AS d ON d.worker = l.incarnation
WHERE l.lived_ms > 0 OR d.attempts > 0
ORDER BY busy_s DESC, l.incarnation;
