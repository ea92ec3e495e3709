-- Who led when, for how long, and what they decided.
-- $since = 0: leave out elections up to this position

WITH decided_in AS (
    SELECT d.epoch, count(*) AS messages, sum(f.events) AS events
    FROM decided AS d
    JOIN frames AS f USING (seq)
    WHERE d.seq <= as_of()
    GROUP BY d.epoch
)
SELECT
    l.epoch,
    l.master,
    l.level,
    l.elected_at,
    l.until,
    l.leads,
    round((epoch_ms(coalesce(l.until, (SELECT max(logged_at) FROM frames WHERE seq <= as_of()))) - epoch_ms(l.elected_at)) / 1000, 3) AS led_s,
    coalesce(d.messages, 0) AS messages,
    coalesce(d.events, 0)::BIGINT AS decisions
FROM leaders AS l
LEFT JOIN decided_in AS d USING (epoch)
WHERE l.epoch > $since
ORDER BY l.epoch;
