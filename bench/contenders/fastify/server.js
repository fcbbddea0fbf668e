// Fastify and the AWS SDK v3: one process, one event loop, the token cached.

import { randomUUID, timingSafeEqual } from 'node:crypto'
import Fastify from 'fastify'
import { SendMessageCommand, SQSClient } from '@aws-sdk/client-sqs'
import { GetParameterCommand, SSMClient } from '@aws-sdk/client-ssm'

const { AWS_REGION: region, SQS_QUEUE_URL: QueueUrl, TOKEN_SSM_PARAMETER: Name, PORT } = process.env
const FIELDS = ['email_subject', 'email_sender', 'email_timestream', 'email_content']
const CACHE_MS = 60_000

const agent = { keepAlive: true, maxSockets: 128 }
const sqs = new SQSClient({ region, requestHandler: { httpAgent: agent, httpsAgent: agent } })
const ssm = new SSMClient({ region })

class ApiError extends Error {
  constructor (status, code, message) {
    super(message)
    this.status = status
    this.code = code
  }
}

let token // the promise of its value: requests share the read in progress
let until = 0
function knownToken () {
  if (Date.now() >= until) {
    until = Date.now() + CACHE_MS
    token = ssm.send(new GetParameterCommand({ Name, WithDecryption: true }))
      .then(response => Buffer.from(response.Parameter.Value))
    token.catch(() => { until = 0 })
  }
  return token
}

function checkToken (given, known) {
  const bytes = Buffer.from(given)
  if (bytes.length !== known.length || !timingSafeEqual(bytes, known)) {
    throw new ApiError(401, 'invalid_token', 'Invalid token.')
  }
}

function isObject (value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function checkData (data) {
  if (!isObject(data)) throw new ApiError(400, 'invalid_data', '"data" is missing or not an object.')
  for (const name of FIELDS) {
    const value = data[name]
    if (name === 'email_timestream' && Number.isInteger(value)) continue
    if (typeof value !== 'string' || value.trim() === '') {
      throw new ApiError(400, 'invalid_data', `${name} is missing, empty or not a string.`)
    }
  }
  const timestamp = data.email_timestream
  const seconds = /^[0-9]+$/.test(timestamp) ? Number(timestamp) : -1
  if (!(seconds >= 946684800 && seconds <= 4102444800)) {
    throw new ApiError(400, 'invalid_timestamp', 'email_timestream is not a valid timestamp.')
  }
}

function attribute (StringValue) {
  return { DataType: 'String', StringValue }
}

// Fastify's own log has two lines for a request; one is as much as the others write.
const app = Fastify({ logger: true, disableRequestLogging: true })

app.addHook('onResponse', async (request, reply) => {
  const { method, url } = request
  request.log.info({ method, url, status: reply.statusCode, ms: reply.elapsedTime }, 'request')
})

app.setErrorHandler((error, request, reply) => {
  const isApiError = error instanceof ApiError
  const status = isApiError ? error.status : error.statusCode < 500 ? error.statusCode : 503
  const code = isApiError ? error.code : status < 500 ? 'invalid_json' : 'queue_unavailable'
  reply.code(status).send({ status: 'error', error: code, message: isApiError ? error.message : '' })
})

const text = { type: 'string' }
const successBody = { type: 'object', properties: { status: text, message: text, message_id: text } }

app.post('/process', { schema: { response: { 200: successBody } } }, async request => {
  const { body } = request
  if (!isObject(body)) throw new ApiError(400, 'invalid_json', 'The request is not a JSON object.')
  if (!body.token) throw new ApiError(401, 'token_required', 'The request needs a "token".')
  checkToken(String(body.token), await knownToken())
  checkData(body.data)
  const sent = await sqs.send(new SendMessageCommand({
    QueueUrl,
    MessageBody: JSON.stringify(body.data),
    MessageAttributes: {
      ContentType: attribute('application/json'),
      ProcessedAt: attribute(new Date().toISOString()),
      RequestId: attribute(request.headers['x-request-id'] ?? randomUUID())
    }
  }))
  return {
    status: 'success',
    message: 'Email data processed and queued',
    message_id: sent.MessageId
  }
})

app.get('/health', async () => ({ status: 'healthy' }))

for (const signal of ['SIGTERM', 'SIGINT']) process.on(signal, () => process.exit(0))
await app.listen({ host: '127.0.0.1', port: Number(PORT) })
