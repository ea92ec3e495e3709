-- Tasks submitted and ended, over time, in equal stretches.
-- $buckets = 60: into how many stretches
-- $since = 0: begin after this position

WITH span AS (
    SELECT epoch_ms(min(logged_at)) AS from_ms, epoch_ms(max(logged_at)) + 1 AS until_ms
    FROM frames
    WHERE seq <= as_of() AND seq > $since
),
steps AS (
    SELECT
        epoch_ms(logged_at) AS at_ms,
        cause IN ('task.submitted', 'workflow.submitted') AND attempt = 0 AS submitted,
        run_us IS NOT NULL AS ran,
        state = 'completed' AS completed,
        state = 'failed' AS failed
    FROM task_changes
    WHERE pos <= end_of(as_of()) AND pos > end_of($since)
),
counted AS (
    SELECT
        (at_ms - from_ms) * $buckets // (until_ms - from_ms) AS bucket,
        count(*) FILTER (submitted) AS submitted,
        count(*) FILTER (ran) AS attempts,
        count(*) FILTER (completed) AS completed,
        count(*) FILTER (failed) AS failed
    FROM steps, span
    GROUP BY bucket
)
SELECT
    make_timestamp_ms((from_ms + (until_ms - from_ms) * b.bucket // $buckets)::BIGINT) AS from_time,
    coalesce(submitted, 0) AS submitted,
    coalesce(attempts, 0) AS attempts,
    coalesce(completed, 0) AS completed,
    coalesce(failed, 0) AS failed,
    round(coalesce(completed, 0) * 1000.0 * $buckets / (until_ms - from_ms), 1) AS completed_per_s
FROM (SELECT range AS bucket FROM range($buckets)) AS b
LEFT JOIN counted USING (bucket), span
WHERE from_ms IS NOT NULL
ORDER BY b.bucket;
