'use strict';
// A device, or a module, as Microsoft's device SDK makes one. Environment: TRANSPORT (mqtt or ws), DEVICE (the
// identity's connection string), ID, MODULE (empty: a device), SERVICE (the service's connection string).

const { Client, ModuleClient, Message } = require('azure-iot-device');
const { Mqtt, MqttWs } = require('azure-iot-device-mqtt');
const iothub = require('azure-iothub');
const { assert, step, until, run } = require('./steps.js');

const { TRANSPORT, DEVICE, ID, MODULE, SERVICE } = process.env;

run(async () => {
  const kind = MODULE ? ModuleClient : Client;
  const client = kind.fromConnectionString(DEVICE, TRANSPORT === 'ws' ? MqttWs : Mqtt);
  const registry = iothub.Registry.fromConnectionString(SERVICE);
  const service = iothub.Client.fromConnectionString(SERVICE);
  const change = (patch) => MODULE ?
    registry.updateModuleTwin(ID, MODULE, patch, '*') : registry.updateTwin(ID, patch, '*');
  const invoke = (call) => MODULE ?
    service.invokeDeviceMethod(ID, MODULE, call) : service.invokeDeviceMethod(ID, call);
  const seenByService = async () =>
    (await (MODULE ? registry.getModuleTwin(ID, MODULE) : registry.getTwin(ID))).responseBody;

  await step('the service sets a desired property', () =>
    change({ properties: { desired: { first: { deep: [1, 'a'] } } } }));
  await step('connect', () => client.open());

  const twin = await step('read the twin', () => client.getTwin());
  assert.deepEqual(twin.properties.desired.first, { deep: [1, 'a'] });
  const version = twin.properties.desired.$version;

  const notified = [];
  twin.on('properties.desired', (delta) => notified.push(delta));
  const last = await step('be notified of desired properties', async () => {
    let n = 0;
    return until(async () => { // until the subscription is there, a notification is lost
      n++;
      await change({ properties: { desired: { n, first: null } } });
      return notified.find((delta) => delta.n > 0 && delta.$version > version);
    });
  });
  assert.equal(last.$version, version + last.n);

  const report = (patch) => new Promise((resolve, reject) => {
    twin.properties.reported.update(patch, (error) => error ? reject(error) : resolve());
  });
  await step('report properties', () => report({ firmware: '1.2', parts: [{ name: 'a' }, { name: 'b' }] }));
  await step('report a deletion', () => report({ firmware: null, left: 4503599627370496 }));
  const reported = (await seenByService()).properties.reported;
  assert.equal(reported.firmware, undefined);
  assert.deepEqual(reported.parts, [{ name: 'a' }, { name: 'b' }]);
  assert.equal(reported.left, 4503599627370496);
  for (const [what, patch, why] of [
    ['a key with a dot', { 'a.b': 1 }, /a key "a\.b"/],
    ['a key with a blank', { 'a b': 1 }, /a key "a b"/],
    ['null in an array', { list: [1, null] }, /list.*null/],
    ['an integer beyond 2^52', { big: 4503599627370497 }, /big.*2\^52/],
    ['a text of 5 KB', { text: 'x'.repeat(5 << 10) }, /text.*bytes/],
    ['33 KB', { all: Array.from({ length: 11 }, () => 'x'.repeat(3 << 10)) }, /bytes, more than 32768/],
  ]) {
    await step(`be refused ${what}`, () => assert.rejects(report(patch), why));
  }
  assert.deepEqual((await seenByService()).properties.reported.parts, reported.parts);

  const answer = (request, response) => response.send(request.payload.fail ? 422 : 200, { got: request.payload });
  if (MODULE) client.onMethod('echo', answer);
  else client.onDeviceMethod('echo', answer);
  const call = (payload) => invoke(
    { methodName: 'echo', payload, responseTimeoutInSeconds: 10, connectTimeoutInSeconds: 10 });
  const first = await step('answer a method', () => call({ list: [1, null, 'ü'] }));
  assert.deepEqual(first.result, { status: 200, payload: { got: { list: [1, null, 'ü'] } } });
  const second = await step('refuse a method', () => call({ fail: true }));
  assert.equal(second.result.status, 422);

  const message = new Message(JSON.stringify({ trouble: 'none' }));
  message.messageId = 'm1';
  message.contentType = 'application/json';
  message.contentEncoding = 'utf-8';
  message.properties.add('kind of', 'a+b&c=é;d');
  await step('send an event', () => client.sendEvent(message));

  if (!MODULE) { // modules have no messages
    const [got, data] = await step('take a message', () => new Promise((resolve) => {
      client.on('message', (m) => client.complete(m, () => resolve([m, m.data.toString()])));
    }));
    assert.equal(data, 'hello');
    assert.equal(got.messageId, 'c1');
    assert.equal(got.properties.getValue('kind of'), 'a+b&c=é d');
  }
  await step('close', () => client.close());
});
