# ci: sqlite3's shell makes a database, changes it, and answers queries.
need sqlite3
rm -f db
rows=200000; [ "$BENCH" = 0 ] || rows=40000
$RUN sqlite3 db <<SQL
PRAGMA cache_size = 4000;
PRAGMA journal_mode = WAL;
CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT, price REAL, tag BLOB);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $rows)
INSERT INTO item SELECT i, 'item ' || (i * 7919 % 100003), (i * 31 % 997) / 7.0, printf('%064d', i * i) FROM n;
CREATE INDEX by_name ON item(name);
CREATE TABLE sale AS SELECT id % 1000 AS who, id AS item, price * (id % 13) AS paid FROM item;
UPDATE item SET price = price * 1.5 WHERE id % 3 = 0;
DELETE FROM item WHERE id % 17 = 0;
SELECT count(*), sum(price), min(name), max(name) FROM item;
SELECT who, count(*), sum(paid) FROM sale GROUP BY who ORDER BY 3 DESC LIMIT 20;
SELECT a.name, count(*) FROM item a JOIN item b USING (name) GROUP BY a.name ORDER BY 2 DESC, 1 LIMIT 20;
SELECT group_concat(substr(tag, 40), '') FROM (SELECT tag FROM item WHERE id % 4001 = 0 ORDER BY name);
VACUUM;
PRAGMA integrity_check;
SQL
[ "$BENCH" = 0 ] || exit 0
$RUN sqlite3 db .dump | cksum
