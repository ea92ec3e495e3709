-- How each lock was used: how often, how long, how often it was lost.
-- $since = 0: leave out what ended up to this position

SELECT
    name,
    any_value(mode) AS mode,
    count(*) AS holdings,
    count(*) FILTER (state = 'held') AS held_now,
    count(*) FILTER (state = 'lost') AS lost,
    count(DISTINCT client) AS clients,
    round(sum(epoch_ms(ended_at) - epoch_ms(acquired_at)) / 1000, 3) AS held_s,
    round(max(epoch_ms(ended_at) - epoch_ms(acquired_at)) / 1000, 3) AS longest_s,
    max_by(holder, token) AS last_holder,
    max(token) AS last_token
FROM locks
WHERE coalesce(ended_seq, as_of()) > $since
GROUP BY name
ORDER BY holdings DESC, name
LIMIT 200;
