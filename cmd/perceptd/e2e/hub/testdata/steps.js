'use strict';
// What the programs beside this one share: each runs steps, and says which.

const assert = require('node:assert/strict');

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// step runs f, which may take a minute: what perceptd reports may wait for half of one.
async function step(name, f) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${name}: no answer after a minute`)), 60000);
  });
  try {
    const result = await Promise.race([f(), late]);
    console.log(`done: ${name}`);
    return result;
  } finally {
    clearTimeout(timer);
  }
}

// until calls f until it returns something.
async function until(f) {
  for (;;) {
    const result = await f();
    if (result) return result;
    await pause(50);
  }
}

// refused asserts that a promise is rejected with an error of that name.
async function refused(promise, name) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.name, name, `${error.name}: ${error.message}`);
    return true;
  });
}

// run runs a program's story, and ends the process with 1 where it fails.
function run(story) {
  story().then(() => process.exit(0), (error) => {
    console.error(error.stack); // the error itself has whole requests in it
    process.exit(1);
  });
}

module.exports = { assert, step, until, refused, run };
