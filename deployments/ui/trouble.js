// What a view says while the cluster does not answer: beside what it shows, and only until the next answer.
//
// Invariant: a failure that may pass takes nothing off the page, so whoever asks again draws into what is still there.

import { h } from "./dom.js";

const AGAIN = "This page tries again by itself.";
const HINTS = {
  0: `Is the cluster up? \`rollout status\` says where its gateway is. ${AGAIN}`,
  403: "Use a key with the scope trainer: the key button is at the top right.",
};

/** A notice, hidden while there is nothing to say: {element, tell(error), clear()}. */
export function makeTrouble() {
  const element = h("p", { class: "notice", role: "status", hidden: true });
  return {
    element,
    tell(error) {
      if (error.status === undefined) console.error(error);
      const message = error.message.replace(/\.$/, "");
      const text = `${message.charAt(0).toUpperCase()}${message.slice(1)}. ${HINTS[error.status] ?? AGAIN}`;
      // Written again, a screen reader would say it again.
      if (element.textContent !== text) element.textContent = text;
      element.hidden = false;
    },
    clear() {
      element.hidden = true;
    },
  };
}
