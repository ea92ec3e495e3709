-- Forget what was reported before a position, $1. What was not stays.

DELETE FROM assigned
WHERE EXISTS (
    FROM reported AS r
    WHERE r.seq < $1 AND r.incarnation = assigned.incarnation
        AND r.task = assigned.task AND r.attempt = assigned.attempt
);

DELETE FROM reported WHERE seq < $1;
