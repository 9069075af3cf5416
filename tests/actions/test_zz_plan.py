import pytest, asyncio, asyncpg
from app import db, outbox
from app.messages import AccountRestarted
from app.errors import Contact

async def put(n):
    now = await db.now()
    async with db.transaction():
        await outbox.put([outbox.Addressed(name=f"N{i}", address=f"n{i}@x.example", email=AccountRestarted(account_name="A", plan_name="P", restarted_at=now, billing_contact=Contact(name="b", email="b@x.example"))) for i in range(n)], account_id=db.uuid7(), now=now, mail_domain="x.example")

@pytest.mark.parametrize("n", [3, 30, 1000])
@pytest.mark.parametrize("off", ["", "hashagg", "hashagg,hashjoin", "hashagg,hashjoin,mergejoin,sort", "hashjoin,mergejoin,hashagg,sort,indexscan,bitmapscan", "material"])
@pytest.mark.parametrize("analyze", [0, 1])
async def test_plan(postgres_database, n, off, analyze):
    await put(n)
    if analyze: await db.execute("ANALYZE outbox")
    c = await asyncpg.connect(db.bound().url)
    for one in filter(None, off.split(",")):
        await c.execute(f"SET enable_{one} = off")
    sql = "UPDATE outbox SET lease = gen_random_uuid(), due_at = now() + interval '5 min', attempts = attempts + 1 WHERE id IN (SELECT id FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL AND due_at <= now() ORDER BY due_at LIMIT 2 FOR UPDATE SKIP LOCKED)"
    plan = await c.fetch("EXPLAIN " + sql)
    r = await c.execute(sql)
    if r != "UPDATE 2":
        print(n, off, analyze, r); print("\n".join(x[0] for x in plan))
    await c.close()
