-- What the log says of one worker: what it was assigned, and what it reported.

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

CREATE TABLE joins (incarnation BIGINT NOT NULL, instance VARCHAR NOT NULL, logged_at TIMESTAMP_MS NOT NULL);

CREATE TABLE assigned (
    incarnation BIGINT NOT NULL,
    task VARCHAR NOT NULL,
    attempt INTEGER NOT NULL,
    runs VARCHAR NOT NULL,
    seq BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL
);

CREATE TABLE reported (
    incarnation BIGINT NOT NULL,
    task VARCHAR NOT NULL,
    attempt INTEGER NOT NULL,
    outcome VARCHAR NOT NULL,
    seq BIGINT NOT NULL,
    logged_at TIMESTAMP_MS NOT NULL
);

-- Whoever starts again had these in hand when it ended; somebody else has them by now, or will.
CREATE VIEW unreported AS
SELECT a.*
FROM assigned AS a
ANTI JOIN reported AS r ON r.incarnation = a.incarnation AND r.task = a.task AND r.attempt = a.attempt
ORDER BY a.seq, a.task;
