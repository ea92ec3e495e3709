-- What people ask. A macro `<name>_at(position)` answers as of the end of the message with that
-- sequence; the view `<name>` answers as of now, or as of the position that the session's
-- variable `as_of` names.

CREATE MACRO seq_of(pos) AS pos >> 13;
CREATE MACRO index_of(pos) AS pos & 8191;
-- The last position of a message.
CREATE MACRO end_of(seq) AS (seq << 13) | 8191;
-- The last position stored at or before a time.
CREATE MACRO position_at(moment) AS (SELECT coalesce(max(seq), 0) FROM frames WHERE logged_at <= moment);

-- Names of what is joined for its name only. Grouped, so that DuckDB sees that there is one row at
-- most, and leaves the join out where nobody asks for the name.
CREATE MACRO worker_names() AS TABLE SELECT worker, any_value(name) AS name FROM worker_joins GROUP BY worker;
CREATE MACRO workflow_ids() AS TABLE SELECT workflow, any_value(id) AS id FROM workflow_submissions GROUP BY workflow;

-- The position the views of this session answer as of.
CREATE MACRO as_of() AS coalesce(getvariable('as_of')::BIGINT, 9007199254740991 >> 13);

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
    WHERE seq <= as_of()
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
LEFT JOIN workflow_ids() AS w USING (workflow)
LEFT JOIN worker_names() AS j ON j.worker = l.worker
WHERE s.pos <= end_of(position);

CREATE VIEW tasks AS FROM tasks_at(as_of());
-- An attempt has one row that begins it, and one at most that ends it: nothing needs to be grouped.
CREATE MACRO attempts_at(position) AS TABLE
WITH begun AS (
    SELECT task, attempt, pos, logged_at, worker
    FROM task_changes
    WHERE state = 'running' AND cause != 'task.started' AND pos <= end_of(position)
),
started AS (
    SELECT task, attempt, min(started_at) AS started_at
    FROM task_changes
    WHERE cause = 'task.started' AND pos <= end_of(position)
    GROUP BY task, attempt
),
ended AS (
    SELECT task, attempt, pos, logged_at, cause, started_at, run_us, error, detail
    FROM task_changes
    WHERE
        attempt > 0
        AND state != 'running'
        AND cause IN ('task.completed', 'task.failed', 'task.declined', 'worker.lost', 'worker.left', 'worker.joined')
        AND pos <= end_of(position)
)
SELECT
    s.id AS task,
    b.attempt,
    j.name AS worker,
    b.worker AS incarnation,
    CASE
        WHEN e.pos IS NULL THEN 'running'
        WHEN e.cause = 'task.failed' AND e.error = 'stopped' THEN 'stopped'
        ELSE split_part(e.cause, '.', 2)
    END AS outcome,
    b.logged_at AS assigned_at,
    coalesce(e.started_at, t.started_at) AS started_at,
    e.logged_at AS ended_at,
    e.run_us,
    e.error,
    e.detail,
    seq_of(b.pos) AS assigned_seq,
    seq_of(e.pos) AS ended_seq,
    index_of(e.pos) AS ended_index,
    b.task AS number
FROM begun AS b
JOIN task_submissions AS s USING (task)
LEFT JOIN ended AS e USING (task, attempt)
LEFT JOIN started AS t USING (task, attempt)
LEFT JOIN worker_names() AS j ON j.worker = b.worker;

CREATE VIEW attempts AS FROM attempts_at(as_of());

CREATE MACRO workflows_at(position) AS TABLE
WITH counted AS (
    SELECT s.workflow, count(*) FILTER (l.state = 'completed') AS completed, count(*) FILTER (l.state = 'failed') AS failed,
        count(*) FILTER (l.state = 'skipped') AS skipped, count(*) FILTER (l.state = 'cancelled') AS cancelled,
        count(*) FILTER (l.state IN ('pending', 'ready', 'running')) AS open
    FROM task_submissions AS s
    JOIN (
        SELECT task, max_by(state, pos) AS state FROM task_changes WHERE pos <= end_of(position) GROUP BY task
    ) AS l USING (task)
    WHERE s.workflow IS NOT NULL
    GROUP BY s.workflow
)
SELECT
    w.id,
    w.name,
    w.description,
    coalesce(e.state, 'running') AS state,
    w.client,
    w.tasks,
    c.completed,
    c.failed,
    c.skipped,
    c.cancelled,
    c.open,
    w.logged_at AS submitted_at,
    e.logged_at AS ended_at,
    seq_of(w.workflow) AS seq,
    index_of(w.workflow) AS "index",
    w.workflow AS number
FROM workflow_submissions AS w
LEFT JOIN counted AS c USING (workflow)
LEFT JOIN (SELECT * FROM workflow_ends WHERE pos <= end_of(position)) AS e USING (workflow)
WHERE w.workflow <= end_of(position);

CREATE VIEW workflows AS FROM workflows_at(as_of());

CREATE VIEW dependencies AS
SELECT w.id AS workflow, a.name AS task, b.name AS depends_on, a.id AS task_id, b.id AS depends_on_id
FROM task_dependencies AS d
JOIN task_submissions AS a ON a.task = d.task
JOIN task_submissions AS b ON b.task = d.depends_on
JOIN workflow_submissions AS w ON w.workflow = a.workflow
WHERE w.workflow <= end_of(as_of());

CREATE MACRO queue_at(position) AS TABLE
SELECT
    row_number() OVER (ORDER BY priority DESC, ready_at, number) AS place,
    id,
    name,
    workflow,
    priority,
    runs,
    ready_at,
    attempts,
    cpu,
    memory_mb,
    gpus,
    "group",
    labels,
    lock,
    number
FROM tasks_at(position)
WHERE state = 'ready';

CREATE VIEW queue AS FROM queue_at(as_of());

CREATE MACRO workers_at(position) AS TABLE
WITH latest AS (
    SELECT worker, max_by(state, pos) AS state, max_by(reason, pos) AS reason,
        max(logged_at) FILTER (state IN ('lost', 'left')) AS ended_at
    FROM worker_changes
    WHERE pos <= end_of(position)
    GROUP BY worker
),
-- A name that joins again ends what it was before.
joined AS (
    SELECT *, lead(logged_at) OVER (PARTITION BY name ORDER BY worker) AS again_at
    FROM worker_joins
    WHERE worker <= position
)
SELECT
    j.name,
    j.worker AS incarnation,
    CASE WHEN l.state IN ('lost', 'left') THEN l.state WHEN j.again_at IS NOT NULL THEN 'lost' ELSE l.state END AS state,
    CASE WHEN l.state NOT IN ('lost', 'left') AND j.again_at IS NOT NULL THEN 'it started anew' ELSE l.reason END AS reason,
    j.slots,
    j.ahead,
    j."group",
    j.labels,
    j.cpu,
    j.memory_mb,
    j.gpus,
    j.functions,
    j.host,
    j.pid,
    j.level,
    j.logged_at AS joined_at,
    coalesce(l.ended_at, j.again_at) AS ended_at
FROM joined AS j
JOIN latest AS l USING (worker);

CREATE VIEW workers AS FROM workers_at(as_of());

CREATE MACRO leaders_at(position) AS TABLE
SELECT
    epoch,
    master,
    level,
    logged_at AS elected_at,
    lead(logged_at) OVER (ORDER BY epoch) AS until,
    lead(logged_at) OVER (ORDER BY epoch) IS NULL AS leads,
    seq_of(pos) AS seq
FROM elections
WHERE pos <= end_of(position);

CREATE VIEW leaders AS FROM leaders_at(as_of());

CREATE MACRO locks_at(position) AS TABLE
WITH known AS (
    SELECT *, lead(pos) OVER later AS end_pos, lead(logged_at) OVER later AS ended_at, lead(change) OVER later AS end_change,
        lead(reason) OVER later AS end_reason
    FROM lock_changes
    WHERE pos <= end_of(position)
    WINDOW later AS (PARTITION BY name, token ORDER BY pos)
)
SELECT
    name,
    token,
    holder,
    client,
    mode,
    permits,
    ttl_s,
    metadata,
    coalesce(end_change, 'held') AS state,
    end_reason AS reason,
    logged_at AS acquired_at,
    ended_at,
    seq_of(pos) AS acquired_seq,
    seq_of(end_pos) AS ended_seq
FROM known
WHERE change = 'acquired';

CREATE VIEW locks AS FROM locks_at(as_of());

CREATE VIEW quarantine AS
SELECT
    seq_of(r.pos) + (r.pos & 8191 = 8191)::BIGINT AS seq,
    CASE WHEN r.pos & 8191 = 8191 THEN -1 ELSE index_of(r.pos) END AS "index",
    f.logged_at,
    r.verdict,
    f.kind,
    f.actor,
    r.reason,
    r.detail,
    f.data
FROM refusals AS r
JOIN frames AS f ON f.seq = seq_of(r.pos) + (r.pos & 8191 = 8191)::BIGINT
WHERE r.verdict IN ('rejected', 'quarantined') AND f.seq <= as_of();

CREATE VIEW decisions AS
SELECT
    d.seq,
    f.logged_at,
    f.kind,
    f.actor,
    f.events,
    d.epoch,
    d.basis,
    d.planned_for,
    d.policy,
    e.master
FROM decided AS d
JOIN frames AS f USING (seq)
LEFT JOIN elections AS e USING (epoch)
WHERE d.seq <= as_of();
