-- What people ask. A macro `<name>_at(position)` answers as of the end of the message with that
-- sequence; the view `<name>` answers as of now.

CREATE MACRO seq_of(pos) AS pos >> 13;
CREATE MACRO index_of(pos) AS pos & 8191;
-- The last position of a message.
CREATE MACRO end_of(seq) AS (seq << 13) | 8191;
-- The last position stored at or before a time.
CREATE MACRO position_at(moment) AS (SELECT coalesce(max(seq), 0) FROM frames WHERE logged_at <= moment);

CREATE VIEW events AS
WITH each AS (
    SELECT
        seq,
        unnest(range(greatest(events, 1)))::INTEGER AS "index",
        stored_ns,
        logged_at,
        kind,
        actor,
        unnest(CASE WHEN events > 0 THEN from_json(coalesce(sound, decode(data)), '["JSON"]') ELSE [NULL] END) AS body
    FROM frames
)
SELECT
    e.seq,
    e."index",
    make_timestamp_ns(e.stored_ns) AS stored_at,
    e.logged_at,
    split_part(e.kind, '.', 1) AS entity,
    e.kind,
    e.actor,
    coalesce(e.body ->> 'id', e.body ->> 'name', e.body ->> 'worker') AS id,
    coalesce(r.verdict, w.verdict, 'applied') AS verdict,
    coalesce(r.reason, w.reason) AS reason,
    coalesce(r.detail, w.detail) AS detail,
    e.body
FROM each AS e
LEFT JOIN refusals AS r ON r.pos = (e.seq << 13) + e."index"
LEFT JOIN refusals AS w ON w.pos = (e.seq << 13) - 1;

CREATE MACRO tasks_at(position) AS TABLE
WITH latest AS (
    SELECT
        task,
        max_by(state, pos) AS state,
        max(attempt) AS attempts,
        max_by(worker, pos) FILTER (worker IS NOT NULL) AS worker,
        min(logged_at) FILTER (state = 'ready') AS ready_at,
        min(coalesce(started_at, logged_at)) FILTER (attempt > 0) AS started_at,
        max(logged_at) FILTER (state IN ('completed', 'failed', 'skipped', 'cancelled')) AS ended_at,
        max_by(run_us, pos) AS run_us,
        max_by(error, pos) AS error,
        max_by(detail, pos) AS detail,
        max(pos) AS changed_pos
    FROM task_changes
    WHERE pos <= end_of(position)
    GROUP BY task
),
prioritized AS (
    SELECT task, max_by(priority, pos) AS priority FROM task_priorities WHERE pos <= end_of(position) GROUP BY task
)
SELECT
    s.id,
    s.title,
    w.id AS workflow,
    coalesce(s.name, s.id) AS name,
    l.state,
    s.runs_kind,
    s.runs,
    coalesce(p.priority, s.priority) AS priority,
    l.attempts,
    s.max_attempts,
    j.name AS worker,
    s.client,
    s.logged_at AS submitted_at,
    l.ready_at,
    l.started_at,
    l.ended_at,
    l.run_us,
    l.error,
    l.detail,
    s.cpu,
    s.memory_mb,
    s.gpus,
    s."group",
    s.labels,
    s.lock,
    s.timeout_s,
    s.queue_timeout_s,
    seq_of(s.pos) AS seq,
    index_of(s.pos) AS "index",
    l.changed_pos,
    s.task AS number
FROM task_submissions AS s
JOIN latest AS l USING (task)
LEFT JOIN prioritized AS p USING (task)
LEFT JOIN workflow_submissions AS w USING (workflow)
LEFT JOIN worker_joins AS j ON j.worker = l.worker
WHERE s.pos <= end_of(position);

CREATE VIEW tasks AS FROM tasks_at(9007199254740991 >> 13);
