'use strict';
// A back-end application by Microsoft's service SDK, over REST alone, that steers perceptd: by its twin, and by direct
// methods. Environment: SERVICE (the service's connection string), ID (of the device that perceptd is).

const iothub = require('azure-iothub');
const { assert, step, until, run } = require('./steps.js');

const { SERVICE, ID } = process.env;
const vault = 'https://vault.azure.net';

run(async () => {
  const registry = iothub.Registry.fromConnectionString(SERVICE);
  const service = iothub.Client.fromConnectionString(SERVICE);
  const call = async (methodName, payload) => (await service.invokeDeviceMethod(ID,
    { methodName, payload, responseTimeoutInSeconds: 20, connectTimeoutInSeconds: 20 })).result;
  const reported = (holds) => until(async () => {
    const percept = (await registry.getTwin(ID)).responseBody.properties.reported.percept;
    return percept && holds(percept) && percept;
  });

  const status = await step('percept.status', () => call('percept.status', {}));
  assert.equal(status.status, 200);
  assert.equal(status.payload.ready, true);
  assert.ok(status.payload.tokens.some((token) => token.resource === vault));

  const explained = await step('percept.explain', () => call('percept.explain', { resource: vault }));
  assert.equal(explained.status, 200);
  assert.ok(explained.payload.explanations.length > 0);

  const changed = await step('percept.policyChanged', () => call('percept.policyChanged',
    { resource: vault, identity: 'device', effect: 'granted', note: 'ticket 12' }));
  assert.equal(changed.status, 200);
  assert.equal(changed.payload.note, 'ticket 12');

  const refreshed = await step('percept.refresh', () =>
    call('percept.refresh', { resource: vault, identity: 'device' }));
  assert.equal(refreshed.status, 200, JSON.stringify(refreshed));

  const unknown = await step('a method that is not there', () => call('percept.none', {}));
  assert.equal(unknown.status, 404);
  const wrong = await step('a payload that is wrong', () => call('percept.deny', { modul: 'vision' }));
  assert.equal(wrong.status, 400);

  const denied = await step('percept.deny', () => call('percept.deny', { module: 'vision', note: 'ticket 13' }));
  assert.equal(denied.status, 200);
  await step('see it reported', () => reported((percept) => percept.summary.denied === 1));
  const lifted = await step('lift it', () => call('percept.deny', { lift: denied.payload.id }));
  assert.equal(lifted.status, 200);

  const desire = (percept, etag) => registry.updateTwin(ID, { properties: { desired: { percept } } }, etag || '*');
  const applied = await step('deny by the twin, and note a policy change', async () => {
    const { etag, version } = await until(async () => { // its ETag changes with each report
      const twin = (await registry.getTwin(ID)).responseBody;
      const update = await desire({
        deny: [{ module: 'vision', note: 'stolen' }],
        policyChanges: [{ resource: vault, effect: 'granted', at: '2026-01-01T00:00:00Z' }],
      }, twin.etag).catch((error) => {
        if (error.name !== 'InvalidEtagError') throw error;
      });
      return update && { etag: twin.etag, version: update.responseBody.properties.desired.$version };
    });
    await assert.rejects(desire({ deny: null }, etag), { name: 'InvalidEtagError' });
    return reported((percept) => percept.desired.version === version && percept.summary.denied === 1);
  });
  assert.equal(applied.desired.status, 'applied', JSON.stringify(applied.desired));

  const query = registry.createQuery(
    'SELECT deviceId FROM devices WHERE properties.reported.percept.summary.denied > 0', 10);
  assert.deepEqual((await step('find it by a query', () => query.next(null))).result, [{ deviceId: ID }]);

  const rules = async () => (await call('percept.deny', null)).payload.rules.map((rule) => rule.origin);
  assert.deepEqual(await step('percept.deny, which lists', rules), ['twin']);
  await step('lift by the twin', async () => {
    await desire({ deny: null });
    return until(async () => (await rules()).length === 0);
  });
});
