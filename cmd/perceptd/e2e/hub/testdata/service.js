'use strict';
// A back-end application by Microsoft's service SDK, over REST alone. Environment: SERVICE (its connection string).

const iothub = require('azure-iothub');
const { assert, step, refused, run } = require('./steps.js');

const { SERVICE } = process.env;

run(async () => {
  const registry = iothub.Registry.fromConnectionString(SERVICE);
  const service = iothub.Client.fromConnectionString(SERVICE);

  const made = (await step('register a device', () => registry.create({ deviceId: 'made' }))).responseBody;
  assert.equal(made.deviceId, 'made');
  assert.ok(made.authentication.symmetricKey.primaryKey);
  await step('register it again', () => refused(registry.create({ deviceId: 'made' }), 'DeviceAlreadyExistsError'));
  await step('disable it', () => registry.update({ deviceId: 'made', status: 'disabled' }));
  assert.equal((await step('look it up', () => registry.get('made'))).responseBody.status, 'disabled');
  await step('register a module', () => registry.addModule({ deviceId: 'made', moduleId: 'percept' }));
  const modules = (await step('list modules', () => registry.getModulesOnDevice('made'))).responseBody;
  assert.deepEqual(modules.map((m) => m.moduleId), ['percept']);
  for (let n = 0; n < 5; n++) await registry.create({ deviceId: `camera-${n}` });
  const listed = (await step('list devices', () => registry.list())).responseBody.map((d) => d.deviceId);
  assert.deepEqual(listed.sort(), ['camera-0', 'camera-1', 'camera-2', 'camera-3', 'camera-4', 'made']);
  const counted = (await step('count devices', () => registry.getRegistryStatistics())).responseBody;
  assert.equal(counted.totalDeviceCount, 6);
  assert.equal(counted.disabledDeviceCount, 1);

  const twin = (await step('read a twin', () => registry.getTwin('camera-0'))).responseBody;
  assert.equal(twin.properties.desired.$version, 1);
  const patch = { tags: { site: 'north' }, properties: { desired: { percept: { deny: [{ module: 'vision' }] } } } };
  const updated = (await step('update it', () => registry.updateTwin('camera-0', patch, twin.etag))).responseBody;
  assert.equal(updated.properties.desired.$version, 2);
  assert.deepEqual(updated.properties.desired.percept.deny, [{ module: 'vision' }]);
  assert.ok(updated.properties.desired.$metadata.percept.$lastUpdated);
  assert.equal(updated.tags.site, 'north');
  await step('update by an old ETag', () =>
    refused(registry.updateTwin('camera-0', patch, twin.etag), 'InvalidEtagError'));
  await step('update what is not there', () => refused(registry.updateTwin('none', patch, '*'), 'DeviceNotFoundError'));
  await step('update with a wrong key', () =>
    refused(registry.updateTwin('camera-0', { properties: { desired: { 'a.b': 1 } } }, '*'), 'ArgumentError'));
  const moduleTwin = (await step('update the twin of a module', () =>
    registry.updateModuleTwin('made', 'percept', { properties: { desired: { a: 1 } } }, '*'))).responseBody;
  assert.equal(moduleTwin.moduleId, 'percept');
  await step('update it by itself', async () => {
    const fresh = (await registry.getTwin('camera-0')).responseBody;
    await fresh.update({ properties: { desired: { level: 3, percept: null } }, tags: { site: 'south' } });
  });
  for (let n = 1; n < 4; n++) await registry.updateTwin(`camera-${n}`, { tags: { site: 'north', n } }, '*');

  const rows = async (sql, size) => {
    const query = registry.createQuery(sql, size);
    const all = [];
    let pages = 0;
    while (query.hasMoreResults) {
      all.push(...(await query.next(query.continuationToken)).result);
      pages++;
    }
    return { all, pages };
  };
  const paged = await step('query, by pages', () => rows("SELECT * FROM devices WHERE tags.site = 'north'", 2));
  assert.deepEqual(paged.all.map((t) => t.deviceId), ['camera-1', 'camera-2', 'camera-3']);
  assert.equal(paged.pages, 2);
  const some = await step('query with AND, OR, NOT, IN and is_defined', () => rows(
    "SELECT deviceId FROM devices WHERE (tags.n IN [1, 2] AND NOT tags.n = 1) OR " +
    'is_defined(properties.desired.level)'));
  assert.deepEqual(some.all.map((t) => t.deviceId), ['camera-0', 'camera-2']);
  const ofModules = await step('query modules', () =>
    rows("SELECT * FROM devices.modules WHERE moduleId = 'percept'"));
  assert.deepEqual(ofModules.all.map((t) => t.deviceId), ['made']);
  for (const sql of ['SELECT', 'SELECT * FROM jobs', "SELECT * FROM devices WHERE SOUNDEX(deviceId) = 'x'"]) {
    await step(`be refused ${sql}`, () => refused(rows(sql), 'ArgumentError'));
  }

  await step('call a method where nothing is connected', () => assert.rejects(
    service.invokeDeviceMethod('camera-0', {
      methodName: 'x', payload: {}, responseTimeoutInSeconds: 5, connectTimeoutInSeconds: 0,
    }), (error) => /DeviceNotOnline/.test(error.responseBody)));

  const configuration = {
    id: 'levels', schemaVersion: '1.0', priority: 10, targetCondition: "tags.site = 'north'",
    content: { deviceContent: { 'properties.desired.percept': { logLevel: 'debug' } } },
  };
  await step('add a configuration', () => registry.addConfiguration(configuration));
  assert.equal((await registry.getTwin('camera-1')).responseBody.properties.desired.percept.logLevel, 'debug');
  assert.equal((await registry.getTwin('camera-0')).responseBody.properties.desired.percept, undefined);
  await step('read it', async () =>
    assert.equal((await registry.getConfiguration('levels')).responseBody.priority, 10));
  await step('remove it', () => registry.removeConfiguration('levels'));
  assert.equal((await registry.getTwin('camera-1')).responseBody.properties.desired.percept, undefined);

  await step('remove a device', () => registry.delete('made'));
  await step('look for it', () => refused(registry.get('made'), 'DeviceNotFoundError'));
  await step('have no rights with another key', () => {
    const wrong = SERVICE.replace(/SharedAccessKey=.*/, 'SharedAccessKey=' + Buffer.alloc(32).toString('base64'));
    return refused(iothub.Registry.fromConnectionString(wrong).get('camera-0'), 'UnauthorizedError');
  });
});
