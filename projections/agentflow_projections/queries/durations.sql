-- How long attempts ran, by what they run. Of very many tasks a sample is measured: one in `every`.
-- $since = 0: leave out what ended up to this position

WITH sample AS (SELECT greatest(1, max(task) // 200000)::UBIGINT AS every FROM task_submissions),
ran AS (
    SELECT task, run_us, error
    FROM task_changes
    WHERE run_us IS NOT NULL AND pos <= end_of(as_of()) AND pos > end_of($since) AND hash(task) % (SELECT every FROM sample) = 0
)
SELECT
    s.runs_kind,
    s.runs,
    count(*) AS attempts,
    count(*) FILTER (r.error IS NOT NULL) AS failed,
    round(sum(r.run_us) / 1e6, 3) AS total_s,
    round(avg(r.run_us) / 1000, 3) AS mean_ms,
    round(quantile_disc(r.run_us, 0.5) / 1000, 3) AS p50_ms,
    round(quantile_disc(r.run_us, 0.95) / 1000, 3) AS p95_ms,
    round(max(r.run_us) / 1000, 3) AS max_ms,
    (SELECT every FROM sample) AS every
FROM ran AS r
JOIN task_submissions AS s USING (task)
GROUP BY s.runs_kind, s.runs
ORDER BY total_s DESC
LIMIT 200;
