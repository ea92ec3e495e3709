-- What a namespace's log says, in rows. Every table but `checkpoint` only ever grows, and every
-- row names the position of the event that caused it, so that any state of the past is what the
-- rows up to a position say. The views for people are in views.sql.
--
-- pos: the position of an event as one number, seq * 8192 + index.
-- logged_at: log time, in UTC.

CREATE TYPE task_state AS ENUM ('pending', 'ready', 'running', 'completed', 'failed', 'skipped', 'cancelled');
CREATE TYPE worker_state AS ENUM ('active', 'draining', 'lost', 'left');

CREATE TABLE checkpoint (
    schema_version INTEGER NOT NULL,
    namespace VARCHAR NOT NULL,
    stream VARCHAR NOT NULL,
    created_ns BIGINT NOT NULL,
    first_seq BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    chain BLOB NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL
);

CREATE TABLE frames (
    seq BIGINT NOT NULL,
    stored_ns BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    kind VARCHAR NOT NULL,
    actor VARCHAR NOT NULL,
    subject VARCHAR,
    headers VARCHAR,
    events INTEGER NOT NULL,
    -- What DuckDB would choose for it takes eight times as long, and three times the space.
    data BLOB NOT NULL USING COMPRESSION zstd,
    sound VARCHAR
);

CREATE TABLE refusals (
    pos BIGINT NOT NULL,
    verdict VARCHAR NOT NULL,
    reason VARCHAR,
    detail VARCHAR
);

CREATE TABLE decided (
    seq BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    basis BIGINT NOT NULL,
    planned_for TIMESTAMP_MS NOT NULL,
    policy INTEGER NOT NULL
);

CREATE TABLE task_submissions (
    task BIGINT NOT NULL,
    id VARCHAR NOT NULL,
    pos BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    workflow BIGINT,
    name VARCHAR,
    title VARCHAR,
    runs_kind VARCHAR NOT NULL,
    runs VARCHAR NOT NULL,
    client VARCHAR NOT NULL,
    priority INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    timeout_s DOUBLE,
    queue_timeout_s DOUBLE,
    cpu DOUBLE,
    memory_mb BIGINT,
    gpus BIGINT,
    "group" VARCHAR,
    labels VARCHAR,
    lock VARCHAR
);

CREATE TABLE task_dependencies (task BIGINT NOT NULL, depends_on BIGINT NOT NULL);

CREATE TABLE task_changes (
    task BIGINT NOT NULL,
    pos BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    state task_state NOT NULL,
    cause VARCHAR NOT NULL,
    attempt INTEGER NOT NULL,
    worker BIGINT,
    started_at TIMESTAMP_MS,
    run_us BIGINT,
    error VARCHAR,
    detail VARCHAR
);

CREATE TABLE task_priorities (task BIGINT NOT NULL, pos BIGINT NOT NULL, logged_at TIMESTAMP_MS NOT NULL, priority INTEGER NOT NULL);

CREATE TABLE task_cancels (task BIGINT NOT NULL, pos BIGINT NOT NULL, logged_at TIMESTAMP_MS NOT NULL, reason VARCHAR);

CREATE TABLE workflow_submissions (
    workflow BIGINT NOT NULL,
    id VARCHAR NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    name VARCHAR,
    description VARCHAR,
    client VARCHAR NOT NULL,
    tasks INTEGER NOT NULL
);

CREATE TABLE workflow_ends (workflow BIGINT NOT NULL, pos BIGINT NOT NULL, logged_at TIMESTAMP_MS NOT NULL, state VARCHAR NOT NULL);

CREATE TABLE worker_joins (
    worker BIGINT NOT NULL,
    name VARCHAR NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    slots INTEGER NOT NULL,
    ahead INTEGER NOT NULL,
    "group" VARCHAR,
    labels VARCHAR,
    cpu DOUBLE NOT NULL,
    memory_mb BIGINT NOT NULL,
    gpus BIGINT NOT NULL,
    functions VARCHAR[],
    host VARCHAR,
    pid BIGINT,
    level INTEGER NOT NULL
);

CREATE TABLE worker_changes (
    worker BIGINT NOT NULL,
    pos BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    state worker_state NOT NULL,
    reason VARCHAR
);

CREATE TABLE elections (epoch BIGINT NOT NULL, pos BIGINT NOT NULL, logged_at TIMESTAMP_MS NOT NULL, master VARCHAR NOT NULL, level INTEGER NOT NULL);

CREATE TABLE master_changes (
    name VARCHAR NOT NULL,
    pos BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    change VARCHAR NOT NULL,
    instance VARCHAR NOT NULL,
    level INTEGER,
    host VARCHAR,
    pid BIGINT
);

CREATE TABLE lock_changes (
    name VARCHAR NOT NULL,
    token BIGINT NOT NULL,
    pos BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL,
    change VARCHAR NOT NULL,
    holder VARCHAR,
    client VARCHAR NOT NULL,
    mode VARCHAR,
    permits INTEGER,
    ttl_s INTEGER,
    metadata VARCHAR,
    reason VARCHAR
);

CREATE TABLE policies (version BIGINT NOT NULL, pos BIGINT NOT NULL, logged_at TIMESTAMP_MS NOT NULL, policy VARCHAR NOT NULL);
